package tcplb

import "errors"

// isAny reports whether err is, or wraps, one of the set.
func isAny(err error, set []error) bool {
	for _, e := range set {
		if errors.Is(err, e) {
			return true
		}
	}
	return false
}
