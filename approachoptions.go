package tcplb

// approachOptions say how backends are connected to: all of a handler, or one. unset is
// what holds for the latter.
func approachOptions[T any](unset string, at func(*T) *ApproachConfig) []option[T] {
	return []option[T]{
		{spec{name: "proxy_protocol", values: "v1|v2|off", path: "proxy_protocol", unset: unset,
			help: "tell backends the client's address in a PROXY header, before any of its bytes; see [Towards the backend](docs/backends.md)"},
			asOptionalText("v1, v2 or off", checkProxyOrOff, func(t *T) *string { return (*string)(&at(t).ProxyProtocol) }).orShown(unset)},
	}
}
