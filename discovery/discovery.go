// Package discovery finds the backends of a pool while it runs.
//
// A source is a guest module in the namespace layer4.tcp_lb.sources, whose
// inline key is "source". Here are a and srv, which ask DNS. One of somebody
// else's is a Source that Caddy can make:
//
//	func init() { caddy.RegisterModule(new(File)) }
//
//	// File has the backends of a file, one a line.
//	type File struct {
//		Path string `json:"path"`
//	}
//
//	func (*File) CaddyModule() caddy.ModuleInfo {
//		return caddy.ModuleInfo{ID: "layer4.tcp_lb.sources.file", New: func() caddy.Module { return new(File) }}
//	}
//
//	func (f *File) Run(ctx context.Context, update func([]discovery.Found)) {
//		for ctx.Err() == nil {
//			if text, err := os.ReadFile(f.Path); err == nil {
//				var found []discovery.Found
//				for address := range strings.FieldsSeq(string(text)) {
//					found = append(found, discovery.Found{Address: address})
//				}
//				if len(found) > 0 { // it may be being written
//					update(found)
//				}
//			}
//			select {
//			case <-ctx.Done():
//			case <-time.After(5 * time.Second):
//			}
//		}
//	}
//
// With UnmarshalCaddyfile it can be written after dynamic, and what follows its
// name is its own to read. A source that can tell how it fares is a Reporter.
package discovery

import (
	"context"
	"time"
)

// Found is one backend.
type Found struct {
	// Address is host:port, the host a literal IP address.
	Address string
	// Weight is the backend's share relative to the others', 1–256. 0 = the
	// source does not say.
	Weight int
	// Backup backends take connections only while no other is available.
	Backup bool
}

// Source finds backends.
type Source interface {
	// Run calls update with each complete answer, one at a time, and returns when
	// ctx ends. It is started with the config and not before, so that a config
	// that is only validated asks nobody. It keeps trouble to itself: while it has
	// no answer it does not call update, and what there was stays; an empty answer
	// takes all that it found away.
	Run(ctx context.Context, update func([]Found))
}

// Reporter is a Source that tells how it fares.
type Reporter interface {
	// Status may be called at any time, also before Run and after it.
	Status() Status
}

// Status is how a source fares.
type Status struct {
	// Source says which it is, as the Caddyfile does: "a db.internal 5432".
	Source string `json:"source"`
	// Backends is how many the last answer has, with what is kept of earlier ones
	// where a part of it failed.
	Backends int `json:"backends"`
	// Answered is when that was; zero = there was none yet.
	Answered time.Time `json:"answered,omitzero"`
	// FailingSince is when lookups began to fail, in whole or in part; zero = the
	// last one did not.
	FailingSince time.Time `json:"failing_since,omitzero"`
	// Error is what is wrong with the last one; empty = nothing.
	Error string `json:"error,omitempty"`
	// Lookups counts the finished ones by how they ended: one of Statuses.
	Lookups map[string]uint64 `json:"lookups"`
}

// How a lookup ends.
const (
	StatusSuccess = "success"
	StatusPartial = "partial" // a part of the answer failed, and keeps what it had
	StatusEmpty   = "empty"   // there is no such name, or nothing to connect to: what there was stays
	StatusFailure = "failure" // no answer: what there was stays
)

// Statuses are all keys of Status.Lookups.
var Statuses = []string{StatusSuccess, StatusPartial, StatusEmpty, StatusFailure}
