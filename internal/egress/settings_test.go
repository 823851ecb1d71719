package egress

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// environ makes an environment of pairs.
func environ(pairs ...string) func(string) string {
	return func(name string) string {
		for i := 0; i < len(pairs); i += 2 {
			if pairs[i] == name {
				return pairs[i+1]
			}
		}
		return ""
	}
}

// file writes a file of this mode.
func file(t *testing.T, text string, mode os.FileMode) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "credentials")
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Chmod(path, mode); err != nil { // whatever the umask is
		t.Fatal(err)
	}
	return path
}

func TestSettings(t *testing.T) {
	private := file(t, "bob:s3cret:x\n", 0o600)
	handed := t.TempDir()
	if err := os.WriteFile(filepath.Join(handed, systemdCredential), []byte("carol:pw"), 0o440); err != nil {
		t.Fatal(err)
	}
	none := []string{}
	for _, tc := range []struct {
		name           string
		s              Settings
		env            []string
		proxy, source  string // "" is no proxy
		noProxy        string
		user, password string
	}{
		{name: "nothing", env: none},
		{name: "the flag", s: Settings{URL: "http://p.example:3128"}, proxy: "http://p.example:3128", source: Flag},
		{name: "the flag beats the environment", s: Settings{URL: "socks5://p.example"}, env: []string{"HTTPS_PROXY", "http://other"}, proxy: "socks5://p.example:1080", source: Flag},
		{name: "none", s: Settings{URL: "None"}, env: []string{"HTTPS_PROXY", "http://other"}},
		{name: "none, with a file that is not needed", s: Settings{URL: "none", Credentials: private}},
		{name: "HTTPS_PROXY", env: []string{"HTTPS_PROXY", "https://p.example", "ALL_PROXY", "socks5://q"}, proxy: "https://p.example:443", source: "HTTPS_PROXY"},
		{name: "lower case first", env: []string{"HTTPS_PROXY", "http://p", "https_proxy", "http://q"}, proxy: "http://q:80", source: "https_proxy"},
		{name: "ALL_PROXY", env: []string{"ALL_PROXY", "socks5h://[2001:db8::1]:1081"}, proxy: "socks5h://[2001:db8::1]:1081", source: "ALL_PROXY"},
		{name: "all_proxy", env: []string{"all_proxy", "p.example:8080"}, proxy: "http://p.example:8080", source: "all_proxy"},
		{name: "none in the environment", env: []string{"https_proxy", "none", "ALL_PROXY", "http://q"}},
		{name: "HTTP_PROXY is for something else", env: []string{"HTTP_PROXY", "http://p"}},
		{name: "NO_PROXY", s: Settings{URL: "p:1"}, env: []string{"no_proxy", "10.0.0.0/8"}, proxy: "http://p:1", source: Flag, noProxy: "10.0.0.0/8"},
		{name: "its flag beats it", s: Settings{URL: "p:1", NoProxy: ".x"}, env: []string{"NO_PROXY", "10.0.0.0/8"}, proxy: "http://p:1", source: Flag, noProxy: ".x"},
		{name: "credentials in the environment", env: []string{"HTTPS_PROXY", "http://al%3Aice:p%40ss@p:1"}, proxy: "http://p:1", source: "HTTPS_PROXY", user: "al:ice", password: "p@ss"},
		{name: "in SALLYWAY_EGRESS_PROXY", s: Settings{URL: "http://alice:pass@p:1"}, proxy: "http://p:1", source: Flag, user: "alice", password: "pass"},
		{name: "a user in the open", s: Settings{URL: "http://alice@p:1", Readable: true}, proxy: "http://p:1", source: Flag, user: "alice"},
		{name: "a file", s: Settings{URL: "http://p:1", Credentials: private, Readable: true}, proxy: "http://p:1", source: Flag, user: "bob", password: "s3cret:x"},
		{name: "a file beats the URL", s: Settings{Credentials: private}, env: []string{"HTTPS_PROXY", "http://alice:pass@p:1"}, proxy: "http://p:1", source: "HTTPS_PROXY", user: "bob", password: "s3cret:x"},
		{name: "systemd", s: Settings{URL: "p:1"}, env: []string{"CREDENTIALS_DIRECTORY", handed}, proxy: "http://p:1", source: Flag, user: "carol", password: "pw"},
		{name: "systemd has another", s: Settings{URL: "p:1"}, env: []string{"CREDENTIALS_DIRECTORY", filepath.Dir(private)}, proxy: "http://p:1", source: Flag},
	} {
		t.Run(tc.name, func(t *testing.T) {
			d, err := tc.s.Open(environ(tc.env...))
			if err != nil {
				t.Fatal(err)
			}
			if tc.proxy == "" {
				if d.Proxy() != "" {
					t.Errorf("%s is used", d.Proxy())
				}
				return
			}
			c, err := d.cfg.Credentials.read()
			if err != nil {
				t.Fatal(err)
			}
			st := d.Status()
			if st.Proxy != tc.proxy || st.Source != tc.source || st.NoProxy != tc.noProxy || c.user != tc.user || c.password != tc.password {
				t.Errorf("%+v as %q with %q", st, c.user, c.password)
			}
		})
	}
}

// TestSettingsRefused: what is refused says what to do, and shows no password.
func TestSettingsRefused(t *testing.T) {
	const secret = "hunter2"
	long := strings.Repeat("x", 300)
	for _, tc := range []struct {
		name string
		s    Settings
		env  []string
		part string
	}{
		{name: "a password in the open", s: Settings{URL: "http://alice:" + secret + "@p:1", Readable: true}, part: "--egress-proxy-credentials"},
		{name: "an empty one, too", s: Settings{URL: "http://alice:@p:1", Readable: true}, part: "--egress-proxy-credentials"},
		{name: "malformed", s: Settings{URL: "http://alice:" + secret + "%zz@p:1"}, part: "malformed"},
		{name: "malformed in the environment", env: []string{"https_proxy", "http://alice:" + secret + "@p:port"}, part: "https_proxy: malformed"},
		{name: "no host", s: Settings{URL: "http://alice:" + secret + "@:1"}, part: "no host"},
		{name: "no port", s: Settings{URL: "http://p:"}, part: "port"},
		{name: "port 0", s: Settings{URL: "http://p:0"}, part: "port"},
		{name: "a path", s: Settings{URL: "http://p:1/x"}, part: "more than"},
		{name: "a query", s: Settings{URL: "http://p:1?" + secret}, part: "more than"},
		{name: "SOCKS4", s: Settings{URL: "socks4://p:1"}, part: `"socks4"`},
		{name: "a file without a proxy", s: Settings{Credentials: "/x"}, part: "--egress-proxy"},
		{name: "no such file", s: Settings{URL: "p:1", Credentials: "/nonexistent/file"}, part: "no such file"},
		{name: "a file for all", s: Settings{URL: "p:1", Credentials: file(t, "u:"+secret, 0o640)}, part: "mode 0640"},
		{name: "no colon", s: Settings{URL: "p:1", Credentials: file(t, secret, 0o600)}, part: "USER:PASSWORD"},
		{name: "no user", s: Settings{URL: "p:1", Credentials: file(t, ":"+secret, 0o600)}, part: "USER:PASSWORD"},
		{name: "two lines", s: Settings{URL: "p:1", Credentials: file(t, "u:"+secret+"\nv:w", 0o600)}, part: "USER:PASSWORD"},
		{name: "long", s: Settings{URL: "p:1", Credentials: file(t, "u:"+secret+long, 0o600)}, part: "255"},
		{name: "large", s: Settings{URL: "p:1", Credentials: file(t, "u:"+secret+strings.Repeat(long, 5), 0o600)}, part: "larger"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			_, err := tc.s.Open(environ(tc.env...))
			if err == nil {
				t.Fatal("taken")
			}
			if !strings.Contains(err.Error(), tc.part) || strings.Contains(fmt.Sprintf("%v %+v %#v", err, err, err), secret) {
				t.Errorf("%v, want %q", err, tc.part)
			}
		})
	}
}

// TestCredentialsAreReplaced: a new password in the file is used by the next connection; one that others can read is not.
func TestCredentialsAreReplaced(t *testing.T) {
	path := file(t, user+":old", 0o600)
	p := &httpProxy{credentials: user + ":" + password, at: greeter(t, "127.0.0.1:0")}
	d, err := Settings{URL: p.start(t), Credentials: path}.Open(environ())
	if err != nil {
		t.Fatal(err)
	}
	e := fails(t, d, outside, Auth, "does not take")
	fails(t, d, outside, Auth, "does not take")
	if n := len(p.targets()); n != 1 {
		t.Errorf("the proxy was shown the wrong password %d times, want once", n)
	}
	d.mu.Lock()
	d.refused.until = time.Now().Add(-time.Second)
	d.mu.Unlock()
	fails(t, d, outside, Auth, "does not take")
	if n := len(p.targets()); n != 2 {
		t.Errorf("the proxy was shown the wrong password %d times, want a second time after a rest", n)
	}
	if !strings.Contains(e.Remedy, path) {
		t.Errorf("the remedy %q does not name the file", e.Remedy)
	}
	write := func(mode os.FileMode, at time.Time) {
		t.Helper()
		if err := os.WriteFile(path, []byte(user+":"+password+"\n"), mode); err != nil {
			t.Fatal(err)
		}
		if err := os.Chmod(path, mode); err != nil {
			t.Fatal(err)
		}
		if err := os.Chtimes(path, at, at); err != nil {
			t.Fatal(err)
		}
	}
	write(0o600, time.Now().Add(time.Minute))
	works(t, d, outside)
	write(0o644, time.Now().Add(2*time.Minute))
	fails(t, d, outside, Auth, "mode 0644")
	write(0o600, time.Now().Add(3*time.Minute))
	works(t, d, outside)
	if err := os.Remove(path); err != nil {
		t.Fatal(err)
	}
	works(t, d, outside) // what was read stays
}

// TestRecall: the doctor gets the daemon's way without its password having been written down.
func TestRecall(t *testing.T) {
	dir := t.TempDir()
	d, err := Recall(dir, environ("HTTPS_PROXY", "http://p:1"))
	if err != nil || d.Proxy() != "http://p:1" {
		t.Fatalf("a daemon that has not run: %v", err)
	}
	save := func(d *Dialer) string {
		t.Helper()
		b := d.Save()
		if err := os.WriteFile(filepath.Join(dir, StateFile), b, 0o600); err != nil {
			t.Fatal(err)
		}
		return string(b)
	}
	save(new(Dialer))
	if d, err := Recall(dir, environ("HTTPS_PROXY", "http://p:1")); err != nil || d.Proxy() != "" || d.Uses("192.0.2.1:1") || d.Status() != nil {
		t.Errorf("a daemon without a proxy: %v, %v", d, err)
	}
	works(t, new(Dialer), greeter(t, "127.0.0.1:0"))
	path := file(t, user+":"+password, 0o600)
	if d, err = (Settings{URL: "socks5h://p:1", Credentials: path, NoProxy: "10.0.0.0/8"}).Open(environ()); err != nil {
		t.Fatal(err)
	}
	save(d)
	d, err = Recall(dir, environ("HTTPS_PROXY", "http://other"))
	if err != nil || d.Proxy() != "socks5h://p:1" || d.Uses("10.1.1.1:1") {
		t.Fatalf("%v, %v", d, err)
	}
	if c, _ := d.cfg.Credentials.read(); c.password != password {
		t.Errorf("as %q", c.user)
	}
	if err := os.Remove(path); err != nil {
		t.Fatal(err)
	}
	if d, err = Recall(dir, environ()); err == nil || d.Proxy() != "socks5h://p:1" {
		t.Errorf("a file of credentials that is gone: %v, %v", d.Proxy(), err)
	}
	env := environ("HTTPS_PROXY", "http://alice:hunter2@p:1")
	if d, err = (Settings{}).Open(env); err != nil {
		t.Fatal(err)
	}
	if text := save(d); strings.Contains(text, "hunter2") || strings.Contains(text, "alice") {
		t.Error(text)
	}
	if d, err = Recall(dir, env); err != nil {
		t.Fatal(err)
	}
	if c, _ := d.cfg.Credentials.read(); c.password != "hunter2" {
		t.Error("the environment's password is not used")
	}
	if d, err = Recall(dir, environ()); err != nil {
		t.Fatal(err)
	}
	if c, _ := d.cfg.Credentials.read(); c.user != "" {
		t.Error(c.user)
	}
	if err := os.WriteFile(filepath.Join(dir, StateFile), []byte("{"), 0o600); err != nil {
		t.Fatal(err)
	}
	if d, err := Recall(dir, environ()); err == nil || d.Proxy() != "" {
		t.Error("a malformed file is taken")
	}
	if d, err := Recall(t.TempDir(), environ("HTTPS_PROXY", "socks4://p")); err == nil || d.Proxy() != "" {
		t.Error("a malformed variable is taken")
	}
}
