package tcplb

import (
	"encoding/json"
	"fmt"
)

// firstDifference says what two handlers' fingerprints differ in, in the words
// of a config.
func firstDifference(one, other string) string {
	var a, b Handler
	if json.Unmarshal([]byte(one), &a) != nil || json.Unmarshal([]byte(other), &b) != nil {
		return "compare them" // never: both come from handlers
	}
	for i := range max(len(a.Backends), len(b.Backends)) {
		switch {
		case i >= len(a.Backends) || i >= len(b.Backends):
			longer := a.Backends
			if len(b.Backends) > len(a.Backends) {
				longer = b.Backends
			}
			return fmt.Sprintf("only one has the backend %q", longer[i].Address)
		case a.Backends[i].Address != b.Backends[i].Address:
			return fmt.Sprintf("backend number %d is %q in one and %q in the other", i+1, a.Backends[i].Address, b.Backends[i].Address)
		}
		if name, x, y, differ := difference(&a.Backends[i], &b.Backends[i], backendOptions); differ {
			return fmt.Sprintf("the %s of backend %q is %s in one and %s in the other", name, a.Backends[i].Address, x, y)
		}
	}
	if name, x, y, differ := difference(&a, &b, handlerOptions); differ {
		return fmt.Sprintf("%s is %s in one and %s in the other", name, x, y)
	}
	return "the options of their policies differ"
}
