// Package literal tells a misspelled IP address from a host's name.
package literal

import (
	"errors"
	"net/netip"
	"strings"
)

var errNoAddress = errors.New("no IP address, and no name, which does not end in a number: want four numbers from 0 to 255, such as 10.0.0.1")

// Check refuses a host that ends in a number, as addresses do and names don't, and is
// no IP address: a name server would be asked for it in vain, or a resolver of C's take
// it for another address. 0x and what follows is a number, too.
func Check(host string) error {
	if _, err := netip.ParseAddr(host); err == nil {
		return nil
	}
	host = strings.TrimSuffix(host, ".")
	if !isNumber(host[strings.LastIndexByte(host, '.')+1:]) {
		return nil
	}
	if a, err := netip.ParseAddr(host); err == nil {
		return errors.New("an IP address has no dot at its end: did you mean " + a.String() + "?")
	}
	return errNoAddress
}

func isNumber(label string) bool {
	digits := "0123456789"
	if len(label) > 1 && label[0] == '0' && (label[1] == 'x' || label[1] == 'X') {
		label, digits = label[2:], digits+"abcdefABCDEF"
		return strings.Trim(label, digits) == ""
	}
	return label != "" && strings.Trim(label, digits) == ""
}
