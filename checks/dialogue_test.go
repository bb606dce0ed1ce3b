package checks

import (
	"bufio"
	"bytes"
	"io"
	"net"
	"regexp"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
)

// steps are sends, and expects after a "<".
func steps(texts ...string) (list []Step) {
	for _, text := range texts {
		if expect, ok := strings.CutPrefix(text, "<"); ok {
			list = append(list, Step{Expect: expect})
		} else {
			list = append(list, Step{Send: text})
		}
	}
	return list
}

// redis is a little of a Redis server, which answers in as many pieces as it is
// told to.
func redis(t testing.TB, role string, piece int) *server {
	return serve(t, func(c net.Conn) {
		lines := bufio.NewScanner(c)
		for lines.Scan() {
			answer := "-ERR unknown command\r\n"
			switch lines.Text() {
			case "PING":
				answer = "+PONG\r\n"
			case "info replication":
				body := "# Replication\r\nrole:" + role + "\r\nconnected_slaves:0\r\n"
				answer = "$" + string(rune('0'+len(body)%10)) + "\r\n" + body + "\r\n"
			case "QUIT":
				_, _ = io.WriteString(c, "+OK\r\n")
				return
			}
			for len(answer) > 0 {
				n := min(piece, len(answer))
				_, _ = io.WriteString(c, answer[:n])
				answer = answer[n:]
			}
		}
	})
}

func TestDialogues(t *testing.T) {
	for _, piece := range []int{1, 3, 4096} {
		for _, c := range []struct {
			name  string
			steps []Step
			want  string // empty = well
		}{
			{"a ping", steps(`PING\r\n`, "<+PONG"), ""},
			{"a role", steps(`PING\r\n`, "<+PONG", `info replication\r\n`, `<role:master\r\n`, `QUIT\r\n`, "<+OK"), ""},
			{"a farewell that is not waited for", steps(`PING\r\n`, "<+PONG", `QUIT\r\n`), ""},
			{"a pattern", steps(`info replication\r\n`, `<~(?m)^role:(master|primary)\r$`), ""},
			{"nobody answers a half sentence", steps(`PING`, "<+PONG"), `expected "+PONG", got nothing: no more within the time`},
			{"another role", steps(`info replication\r\n`, `<role:slave\r\n`, `QUIT\r\n`), `expected "role:slave\r\n", got "$`},
			{"an error", steps(`AUTH x\r\n`, `QUIT\r\n`, "<+PONG"), `expected "+PONG", got `},
			{"order", steps(`PING\r\nQUIT\r\n`, "<+OK", "<+PONG"), `expected "+PONG", got "\r\n": the backend closed the connection`},
			{"an answer is one answer", steps(`PING\r\nQUIT\r\n`, "<+PONG", "<+PONG"), `expected "+PONG", got`},
			{"what came before is no answer", steps(`PING\r\n`, "<+PONG", `QUIT\r\n`, "<PONG"), `expected "PONG", got "`},
		} {
			t.Run(c.name, func(t *testing.T) {
				s := redis(t, "master", piece)
				within := hangTimeout
				if strings.Contains(c.want, "within the time") || c.name == "another role" {
					within = 50 * time.Millisecond
				}
				err := s.checkWithin(t, within, provisioned(t, &Dialogue{Steps: c.steps}), Wire{})
				if c.want == "" {
					require.NoError(t, err)
				} else {
					require.ErrorContains(t, err, c.want)
				}
			})
		}
	}
}

func TestBannerDialogues(t *testing.T) {
	for name, c := range map[string]struct {
		banner string
		steps  []Step
		want   string
	}{
		"SMTP":                 {"220 mail ESMTP\r\n", steps("<220 ", `QUIT\r\n`), ""},
		"IMAP":                 {"* OK ready\r\n", steps("<* OK"), ""},
		"SSH":                  {"SSH-2.0-OpenSSH_9.2\r\n", steps("<~^SSH-2\\.0-"), ""},
		"binary":               {"\x00\x01\xff\xfe", steps(`<\x01\xFF`), ""},
		"not well":             {"421 too busy\r\n", steps("<220 "), `expected "220 ", got "421 too busy\r\n": the backend closed the connection`},
		"silence":              {"", steps("<220 "), `expected "220 ", got nothing: the backend closed the connection`},
		"another service":      {"HTTP/1.1 400 Bad Request\r\n", steps("<~^SSH-"), `expected ~"^SSH-", got "HTTP/1.1 400`},
		"much":                 {strings.Repeat("x", maxAnswer-4) + "220 ", steps("<220 "), ""},
		"much more":            {strings.Repeat("x", maxAnswer+1) + "220 ", steps("<220 "), `expected "220 ", not found in the first 64 KB`},
		"much more, a pattern": {strings.Repeat("x", maxAnswer+1) + "220 ", steps("<~220"), `expected ~"220", not found in the first 64 KB`},
		"much that is garbage": {strings.Repeat("\x00", 200), steps("<220 "), `got "\x00`},
	} {
		t.Run(name, func(t *testing.T) {
			s := serve(t, func(conn net.Conn) {
				_, _ = io.WriteString(conn, c.banner)
				if strings.HasPrefix(name, "much more") { // a reset could overtake it
					_, _ = io.Copy(io.Discard, conn)
				}
			})
			err := s.check(t, provisioned(t, &Dialogue{Steps: c.steps}), Wire{})
			if c.want == "" {
				require.NoError(t, err)
				return
			}
			require.ErrorContains(t, err, c.want)
			require.Less(t, len(err.Error()), maxText+10)
		})
	}
}

// A backend that takes nothing and says nothing holds a check no longer than its
// time.
func TestDialogueWithAStalledBackend(t *testing.T) {
	release := make(chan struct{})
	defer close(release)
	s := serve(t, func(net.Conn) { <-release })
	for name, list := range map[string][]Step{
		"reads nothing": {{Send: strings.Repeat("x", 16<<20)}, {Expect: "y"}},
		"says nothing":  {{Expect: "y"}},
	} {
		t.Run(name, func(t *testing.T) {
			err := s.checkWithin(t, 50*time.Millisecond, provisioned(t, &Dialogue{Steps: list}), Wire{})
			var timeout net.Error
			require.ErrorAs(t, err, &timeout)
			require.True(t, timeout.Timeout(), err)
		})
	}
}

func TestUnescape(t *testing.T) {
	for text, want := range map[string]string{
		"":                  "",
		"PING\r\n":          "PING\r\n",
		`PING\r\n`:          "PING\r\n",
		`\t\\\"`:            "\t\\\"",
		`\x00\xfF\x7e\x20x`: "\x00\xff~ x",
		"Grüße":             "Grüße",
	} {
		got, err := unescape(text)
		require.NoError(t, err)
		require.Equal(t, want, string(got))
	}
	for text, want := range map[string]string{
		`a\`:    "a lone",
		`\q`:    `no escape \q`,
		`\ü`:    `no escape \ü`,
		`\x`:    "two hexadecimal digits",
		`\x4`:   "two hexadecimal digits",
		`\x4g`:  "two hexadecimal digits",
		`\x4\n`: "two hexadecimal digits",
	} {
		_, err := unescape(text)
		require.ErrorContains(t, err, want)
	}
}

func TestDialogueRefuses(t *testing.T) {
	for want, list := range map[string][]Step{
		"no steps":                    nil,
		"step 1: want a text to send": {{}},
		"step 2: want a send or":      {{Send: "a"}, {Send: "a", Expect: "b"}},
		`send "\\q": there is no`:     {{Send: `\q`}},
		`expect "\\q": there is no`:   {{Expect: `\q`}},
		"a regular expression":        {{Expect: "~("}},
		"it matches no answer at all": {{Expect: "~a*"}},
		`and other bytes as \xNN`:     {{Send: "\xff"}},
		"want 64 KB at most":          {{Expect: strings.Repeat("x", maxAnswer+1)}},
	} {
		require.ErrorContains(t, (&Dialogue{Steps: list}).Provision(newContext(t)), want)
	}
}

// FuzzUnescape: what is accepted has each of its bytes once, and can be written
// in bytes alone.
func FuzzUnescape(f *testing.F) {
	for _, text := range []string{"", `PING\r\n`, `\x00\\x`, `\`, `\"\t`, "\xff", `\xe`} {
		f.Add(text)
	}
	f.Fuzz(func(t *testing.T, text string) {
		got, err := unescape(text)
		if err != nil {
			require.Contains(t, text, `\`)
			return
		}
		require.LessOrEqual(t, len(got), len(text))
		var spelled strings.Builder
		const hex = "0123456789abcdef"
		for _, b := range got {
			spelled.WriteString(`\x` + string(hex[b>>4]) + string(hex[b&15]))
		}
		again, err := unescape(spelled.String())
		require.NoError(t, err)
		require.Equal(t, got, again)
	})
}

// FuzzAnswer: an answer in pieces is found where the whole is, step by step.
func FuzzAnswer(f *testing.F) {
	f.Add([]byte("+PONG\r\nrole:master\r\n"), []byte("+PONG"), []byte("master"), uint8(1))
	f.Add([]byte("aaab"), []byte("aab"), []byte("a"), uint8(2))
	f.Add([]byte("abcabc"), []byte("abc"), []byte("abc"), uint8(4))
	f.Fuzz(func(t *testing.T, said, first, second []byte, piece uint8) {
		if len(first) == 0 || len(second) == 0 || len(said) > maxAnswer {
			return
		}
		i := bytes.Index(said, first)
		want := i >= 0 && bytes.Contains(said[i+len(first):], second)
		found := func(one, other step) bool {
			var a answer
			r := &pieces{said, 1 + int(piece)}
			return a.await(r, one) == nil && a.await(r, other) == nil
		}
		require.Equal(t, want, found(step{expect: first}, step{expect: second}))
		if isText(said) && isText(first) && isText(second) { // for which patterns are
			require.Equal(t, want, found(step{pattern: quoted(first)}, step{pattern: quoted(second)}))
		}
	})
}

func isText(b []byte) bool { return bytes.IndexFunc(b, func(r rune) bool { return r >= 0x80 }) < 0 }

func quoted(b []byte) *regexp.Regexp { return regexp.MustCompile(regexp.QuoteMeta(string(b))) }

// pieces is a reader that hands out a few bytes at a time.
type pieces struct {
	left []byte
	size int
}

func (p *pieces) Read(b []byte) (int, error) {
	if len(p.left) == 0 {
		return 0, io.EOF
	}
	n := copy(b, p.left[:min(p.size, len(p.left))])
	p.left = p.left[n:]
	return n, nil
}
