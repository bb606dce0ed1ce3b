package tcplb

import (
	"context"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"golang.org/x/net/dns/dnsmessage"
)

// What Go's resolver makes of a server's answers.
func TestLookupHost(t *testing.T) {
	const host = "db.tcp-lb.test"
	both := []string{"10.0.0.1", "10.0.0.2", "fd00::1"}
	const a, aaaa = dnsmessage.TypeA, dnsmessage.TypeAAAA
	for _, c := range []struct {
		name     string
		known    []string
		fault    fault
		of       []dnsmessage.Type
		want     []string // in any order
		part     bool
		notFound bool
	}{
		{"answered", both, faultNone, nil, both, false, false},
		{"one family", both[:2], faultNone, nil, both[:2], false, false},
		{"truncated, and whole over TCP", both, faultTruncates, nil, both, false, false},
		{"no such host", nil, faultNone, nil, nil, false, true},
		{"no address", both, faultEmpty, nil, nil, false, true},
		{"fails", both, faultFails, nil, nil, false, false},
		{"refuses", both, faultRefuses, nil, nil, false, false},
		{"fails for one family, has no address of the other", both[2:], faultFails, []dnsmessage.Type{aaaa}, nil, false, false},
		{"the same the other way round", both[:2], faultFails, []dnsmessage.Type{a}, nil, false, false},
		{"fails for one family, answers for the other", both, faultFails, []dnsmessage.Type{aaaa}, both[:2], true, false},
		{"no address of one family", both, faultEmpty, []dnsmessage.Type{a}, both[2:], false, false},
	} {
		t.Run(c.name, func(t *testing.T) {
			s := startNameServer(t)
			s.answer(host, c.known...)
			s.fail(c.fault, c.of...)
			got, err := lookupHost(t.Context(), host)
			if c.want == nil {
				require.Error(t, err)
				require.Equal(t, c.notFound, isNotFound(err), "%v", err)
				return
			}
			require.NoError(t, err)
			require.ElementsMatch(t, addrs(c.want...), got.addrs)
			require.Equal(t, c.part, !got.whole)
		})
	}
}

func TestLookupHostUnanswered(t *testing.T) {
	s := startNameServer(t)
	s.answer("db.tcp-lb.test", "10.0.0.1")
	for _, f := range []fault{faultSilent, faultGarbage} {
		s.fail(f)
		ctx, cancel := context.WithTimeout(t.Context(), 100*time.Millisecond)
		_, err := lookupHost(ctx, "db.tcp-lb.test")
		cancel()
		require.Error(t, err)
		require.False(t, isNotFound(err), "%v", err)
	}
}

func TestLookupHostWithoutDNS(t *testing.T) {
	s := startNameServer(t)
	got, err := lookupHost(t.Context(), "localhost")
	require.NoError(t, err)
	require.True(t, got.addrs[0].IsLoopback())
	for _, name := range []string{"x.onion", "a name"} {
		_, err := lookupHost(t.Context(), name)
		require.True(t, isNotFound(err), "%s: %v", name, err)
	}
	require.Zero(t, s.questions())
}

// Lookups leave at least half of the reserve of files to others.
func TestLookupSlots(t *testing.T) {
	for _, limit := range []uint64{0, 64, 256, 1024, 20_000, 1 << 40} {
		all, trouble := newLookupSlots(limit)
		require.Positive(t, cap(all))
		require.Positive(t, cap(trouble))
		if limit > 0 {
			require.LessOrEqual(t, uint64(2*(cap(all)+cap(trouble))), min(128, limit/4)/2, "limit %d", limit)
		}
	}
}
