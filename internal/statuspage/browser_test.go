package statuspage

import (
	"bufio"
	"encoding/base64"
	"encoding/json"
	"errors"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
)

const hangTimeout = 60 * time.Second

// browser is a Chromium without a window, told what to do over a pair of pipes.
type browser struct {
	t       testing.TB
	in      io.Writer
	mu      sync.Mutex
	nextID  int
	answers map[int]chan message
	console []string // what the browser complained of
	session string
	loaded  chan struct{}
}

type message struct {
	ID        int             `json:"id,omitempty"`
	Method    string          `json:"method,omitempty"`
	Params    json.RawMessage `json:"params,omitempty"`
	Result    json.RawMessage `json:"result,omitempty"`
	SessionID string          `json:"sessionId,omitempty"`
	Error     *struct {
		Message string `json:"message"`
	} `json:"error,omitempty"`
}

// startBrowser starts a Chromium with one tab, and ends it with the test.
func startBrowser(t testing.TB) *browser {
	t.Helper()
	if runtime.GOOS == "windows" {
		t.Skip("a process has no further pipes there")
	}
	program := ""
	for _, name := range []string{"chromium", "chromium-browser", "google-chrome"} {
		if path, err := exec.LookPath(name); err == nil {
			program = path
			break
		}
	}
	if program == "" {
		if os.Getenv("TCPLB_REQUIRE_SERVERS") != "" {
			t.Fatal("TCPLB_REQUIRE_SERVERS is set, but this is missing: chromium (Debian: apt-get install chromium)")
		}
		t.Skip("needs chromium (Debian: apt-get install chromium)")
	}
	theirIn, ourOut, err := os.Pipe()
	require.NoError(t, err)
	ourIn, theirOut, err := os.Pipe()
	require.NoError(t, err)
	cmd := exec.Command(program, "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run", "--no-proxy-server",
		"--disable-background-networking", "--disable-component-update", "--user-data-dir="+t.TempDir(), "--remote-debugging-pipe", "about:blank")
	cmd.ExtraFiles = []*os.File{theirIn, theirOut}
	cmd.Env = append(os.Environ(), "HOME="+t.TempDir())
	require.NoError(t, cmd.Start())
	require.NoError(t, errors.Join(theirIn.Close(), theirOut.Close()))
	b := &browser{t: t, in: ourOut, answers: make(map[int]chan message), loaded: make(chan struct{}, 100)}
	done := make(chan struct{})
	go b.read(ourIn, done)
	t.Cleanup(func() {
		_, _, _ = b.send("Browser.close", nil)
		kill := time.AfterFunc(10*time.Second, func() { _ = cmd.Process.Kill() })
		_ = cmd.Wait()
		kill.Stop()
		_ = ourOut.Close()
		<-done
		_ = ourIn.Close()
	})
	var target struct{ TargetID, SessionID string }
	b.call("Target.createTarget", map[string]any{"url": "about:blank"}, &target)
	b.call("Target.attachToTarget", map[string]any{"targetId": target.TargetID, "flatten": true}, &target)
	b.session = target.SessionID
	for _, domain := range []string{"Page", "Runtime", "Log", "Audits"} {
		b.call(domain+".enable", nil, nil)
	}
	return b
}

func (b *browser) read(in io.Reader, done chan<- struct{}) {
	defer close(done)
	for r := bufio.NewReaderSize(in, 1<<20); ; {
		text, err := r.ReadBytes(0)
		if err != nil {
			return
		}
		var m message
		if json.Unmarshal(text[:len(text)-1], &m) != nil {
			continue
		}
		b.mu.Lock()
		switch answer := b.answers[m.ID]; {
		case answer != nil:
			delete(b.answers, m.ID)
			answer <- m
		case m.Method == "Page.loadEventFired":
			b.loaded <- struct{}{}
		case m.Method == "Log.entryAdded", m.Method == "Runtime.consoleAPICalled", m.Method == "Runtime.exceptionThrown", m.Method == "Audits.issueAdded":
			b.console = append(b.console, string(m.Params))
		}
		b.mu.Unlock()
	}
}

func (b *browser) send(method string, params any) (chan message, int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.nextID++
	answer := make(chan message, 1)
	b.answers[b.nextID] = answer
	m := map[string]any{"id": b.nextID, "method": method}
	if params != nil {
		m["params"] = params
	}
	if b.session != "" && !strings.HasPrefix(method, "Browser.") {
		m["sessionId"] = b.session
	}
	text, err := json.Marshal(m)
	if err == nil {
		_, err = b.in.Write(append(text, 0))
	}
	return answer, b.nextID, err
}

// call has the browser do something and waits until it has.
func (b *browser) call(method string, params, result any) {
	b.t.Helper()
	answer, _, err := b.send(method, params)
	require.NoError(b.t, err)
	select {
	case m := <-answer:
		require.Nil(b.t, m.Error, "%s", method)
		if result != nil {
			require.NoError(b.t, json.Unmarshal(m.Result, result))
		}
	case <-time.After(hangTimeout):
		require.FailNow(b.t, "no answer from the browser", method)
	}
}

// open opens the address and waits until all of it is there.
func (b *browser) open(url string) {
	b.t.Helper()
	for len(b.loaded) > 0 {
		<-b.loaded
	}
	b.call("Page.navigate", map[string]any{"url": url}, nil)
	b.awaitLoad()
}

func (b *browser) awaitLoad() {
	b.t.Helper()
	select {
	case <-b.loaded:
	case <-time.After(hangTimeout):
		require.FailNow(b.t, "the page never loaded")
	}
}

// look sets the size of the window and the theme.
func (b *browser) look(width, height int, theme string) {
	b.t.Helper()
	b.call("Emulation.setDeviceMetricsOverride", map[string]any{"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 500}, nil)
	b.call("Emulation.setEmulatedMedia", map[string]any{"features": []any{map[string]any{"name": "prefers-color-scheme", "value": theme}}}, nil)
}

// eval returns the value of a script, which runs whatever the page allows.
func (b *browser) eval(script string, result any) {
	b.t.Helper()
	var answer struct {
		Result           struct{ Value json.RawMessage }
		ExceptionDetails json.RawMessage
	}
	b.call("Runtime.evaluate", map[string]any{"expression": script, "returnByValue": true, "awaitPromise": true}, &answer)
	require.Empty(b.t, string(answer.ExceptionDetails))
	require.NoError(b.t, json.Unmarshal(answer.Result.Value, result))
}

// press presses a key that has no character.
func (b *browser) press(key string, code int) {
	b.t.Helper()
	for _, kind := range []string{"keyDown", "keyUp"} {
		b.call("Input.dispatchKeyEvent", map[string]any{"type": kind, "key": key, "code": key, "windowsVirtualKeyCode": code, "text": map[string]string{"Enter": "\r"}[key]}, nil)
	}
}

// complaints are what the browser has said so far of pages.
func (b *browser) complaints() []string {
	b.mu.Lock()
	defer b.mu.Unlock()
	return append([]string{}, b.console...)
}

// keep writes a picture of the window to the directory that TCPLB_PICTURES
// names, if it does.
func (b *browser) keep(name string) {
	b.t.Helper()
	dir := os.Getenv("TCPLB_PICTURES")
	if dir == "" {
		return
	}
	var picture struct{ Data string }
	b.call("Page.captureScreenshot", map[string]any{}, &picture)
	data, err := base64.StdEncoding.DecodeString(picture.Data)
	require.NoError(b.t, err)
	require.NoError(b.t, os.WriteFile(filepath.Join(dir, name+".png"), data, 0o644))
}
