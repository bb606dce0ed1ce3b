//go:build !linux

package listener

import (
	"context"
	"errors"
	"net"

	"go.uber.org/zap"
)

// Listen returns errors.ErrUnsupported: there is Linux's only.
func Listen(context.Context, string, net.ListenConfig, Arrivals, func() *zap.Logger) (net.Listener, error) {
	return nil, errors.ErrUnsupported
}

// Entrances returns those that have books: none.
func Entrances() []*Entrance { return nil }

// Accepting returns nil: nobody does.
func Accepting(string) *WaitingList { return nil }
