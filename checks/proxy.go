package checks

// ProxyVersion is a version of the PROXY protocol, v1 or v2; empty = none.
type ProxyVersion string

// local returns the header of a connection that is the sender's own and nobody
// else's, for which the receiver takes the real addresses.
// See https://www.haproxy.org/download/2.9/doc/proxy-protocol.txt, 2.1 and 2.2.
func (v ProxyVersion) local() string {
	switch v {
	case "v1":
		return "PROXY UNKNOWN\r\n"
	case "v2":
		return "\r\n\r\n\x00\r\nQUIT\n" + "\x20" + "\x00" + "\x00\x00" // version 2, LOCAL; unspecified; nothing follows
	}
	return ""
}

// Valid reports whether there is such a version.
func (v ProxyVersion) Valid() bool { return v.local() != "" }
