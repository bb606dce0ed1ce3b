// Package secure is TLS to a backend, as a relay needs it: who waits for bytes
// holds no buffer, and what crypto/tls keeps can be given back meanwhile. A cut
// is the socket's, and closing does not wait for room for a last word.
package secure
