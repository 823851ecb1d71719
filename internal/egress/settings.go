package egress

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net/url"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"time"
)

// None is the URL that says: no proxy, whatever the environment names.
const None = "none"

// Flag is the name of the setting that names the proxy.
const Flag = "--egress-proxy"

// systemdCredential is the name under which systemd may hand over the credentials (LoadCredential=).
const systemdCredential = "egress-proxy"

// maxCredentials bounds a file with user and password, in bytes.
const maxCredentials = 1 << 10

// Settings is what a user says about the proxy. The zero value leaves it to the environment.
type Settings struct {
	// URL names the proxy; None is none, "" what HTTPS_PROXY or else ALL_PROXY says, in either case of letters.
	URL string
	// Readable says that others can read the URL, as on a command line or in a file of settings: it must hold no password.
	Readable bool
	// Credentials is a file with USER:PASSWORD that nobody else can read; "" is $CREDENTIALS_DIRECTORY/egress-proxy where systemd has put
	// one, else what the URL holds.
	Credentials string
	// NoProxy is Config's; "" is what NO_PROXY says.
	NoProxy string
}

// Config completes the settings by the environment; use is false where there is no proxy.
func (s Settings) Config(getenv func(string) string) (cfg Config, use bool, err error) {
	first := func(names ...string) (name, value string) {
		for _, n := range names {
			for _, n := range []string{strings.ToLower(n), n} {
				if v := getenv(n); v != "" {
					return n, v
				}
			}
		}
		return "", ""
	}
	cfg = Config{URL: s.URL, Source: Flag, NoProxy: s.NoProxy}
	if cfg.NoProxy == "" {
		_, cfg.NoProxy = first("NO_PROXY")
	}
	if cfg.URL == "" {
		cfg.Source, cfg.URL = first("HTTPS_PROXY", "ALL_PROXY")
	}
	if cfg.URL == "" || strings.EqualFold(cfg.URL, None) {
		if s.Credentials != "" && s.URL == "" {
			return Config{}, false, errors.New("--egress-proxy-credentials is given, and no proxy: name it with --egress-proxy")
		}
		return Config{}, false, nil
	}
	u, err := parse(cfg.URL)
	if err != nil {
		if cfg.Source != Flag {
			return Config{}, false, fmt.Errorf("%s: %w\nset it right, or do without: --egress-proxy none", cfg.Source, err)
		}
		return Config{}, false, fmt.Errorf("%s: %w", cfg.Source, err)
	}
	if _, secret := u.User.Password(); secret && s.URL != "" && s.Readable {
		return Config{}, false, fmt.Errorf("%s holds a password, which others on this host can read there\n%s, and leave user and password out of the URL", Flag, credentialsRemedy)
	}
	file := s.Credentials
	if dir := getenv("CREDENTIALS_DIRECTORY"); file == "" && dir != "" {
		handed := filepath.Join(dir, systemdCredential)
		if _, err := os.Stat(handed); err == nil {
			cfg.Credentials, err = readCredentials(handed, false)
			return cfg, err == nil, err
		}
	}
	if file != "" {
		if cfg.Credentials, err = readCredentials(file, true); err != nil {
			return Config{}, false, err
		}
	} else if cfg.Credentials = inURL(u); cfg.Credentials != nil {
		cfg.Credentials.now.source = "they stand in " + cfg.Source
	}
	return cfg, true, nil
}

// Open makes the Dialer that the settings and the environment say.
func (s Settings) Open(getenv func(string) string) (*Dialer, error) {
	cfg, use, err := s.Config(getenv)
	if err != nil {
		return nil, err
	}
	if !use {
		return new(Dialer), nil
	}
	return New(cfg)
}

// credentials are a user and a password; no user is none.
type credentials struct {
	user, password string
	source         string // where they stand, for people
}

// Credentials are a user and a password that may be replaced in their file while they are used. The methods of a nil one return none.
type Credentials struct {
	path string // "" where no file has them

	mu      sync.Mutex // guards what follows
	now     credentials
	changed time.Time // of the file
}

// inURL are the credentials of a URL; nil where it has none.
func inURL(u *url.URL) *Credentials {
	if u.User == nil || u.User.Username() == "" {
		return nil
	}
	c := &Credentials{now: credentials{user: u.User.Username(), source: "they stand in the proxy's URL"}}
	c.now.password, _ = u.User.Password()
	return c
}

// readCredentials reads a file with USER:PASSWORD. Errors show neither.
func readCredentials(path string, private bool) (*Credentials, error) {
	c := &Credentials{path: path}
	fi, err := c.load(private)
	if err != nil {
		return nil, err
	}
	if !fi.Mode().IsRegular() {
		c.path = "" // a pipe is read once
	}
	return c, nil
}

// Path is the file, "" where there is none.
func (c *Credentials) Path() string {
	if c == nil {
		return ""
	}
	return c.path
}

// load reads the file.
func (c *Credentials) load(private bool) (fs.FileInfo, error) {
	f, err := os.Open(c.path)
	if err != nil {
		return nil, fmt.Errorf("credentials of the egress proxy: %w", err)
	}
	defer f.Close()
	fi, err := f.Stat()
	if err != nil {
		return nil, fmt.Errorf("credentials of the egress proxy: %w", err)
	}
	if private && runtime.GOOS != "windows" && fi.Mode().IsRegular() && fi.Mode().Perm()&0o077 != 0 {
		return nil, fmt.Errorf("%s, with the password of the egress proxy, has mode %04o: others can read it\nchmod 600 %s", c.path, fi.Mode().Perm(), c.path)
	}
	b, err := io.ReadAll(io.LimitReader(f, maxCredentials+1))
	if err != nil {
		return nil, fmt.Errorf("credentials of the egress proxy: %w", err)
	}
	text := strings.TrimRight(string(b), "\r\n")
	user, password, ok := strings.Cut(text, ":")
	switch {
	case len(b) > maxCredentials:
		return nil, fmt.Errorf("%s is larger than %d bytes: is it the right file?", c.path, maxCredentials)
	case !ok || user == "" || strings.ContainsFunc(text, func(r rune) bool { return r < ' ' || r == 0x7f }):
		return nil, fmt.Errorf("%s does not hold one line USER:PASSWORD", c.path)
	case len(user) > 255 || len(password) > 255:
		return nil, fmt.Errorf("%s: user and password have at most 255 bytes each", c.path)
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	c.now, c.changed = credentials{user, password, "they stand in " + c.path}, fi.ModTime()
	return fi, nil
}

// read returns the credentials, those of the file as it is now.
func (c *Credentials) read() (credentials, error) {
	if c == nil {
		return credentials{}, nil
	}
	if c.path != "" {
		fi, err := os.Stat(c.path)
		c.mu.Lock()
		stale := err == nil && !fi.ModTime().Equal(c.changed)
		c.mu.Unlock()
		// A file that is gone, or that this process may not read any more, leaves what it held.
		if stale {
			if _, err := c.load(filepath.Base(c.path) != systemdCredential); err != nil {
				return credentials{}, err
			}
		}
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.now, nil
}

// StateFile keeps, in a daemon's state folder, what proxy it uses, so that the doctor looks by the same way. It holds no password.
const StateFile = "egress.json"

// saved is StateFile. An empty Proxy is none.
type saved struct {
	Proxy       string `json:"proxy"`
	Source      string `json:"source,omitempty"`
	NoProxy     string `json:"no_proxy,omitempty"`
	Credentials string `json:"credentials,omitempty"` // path
}

// Save encodes StateFile for a daemon that uses d.
func (d *Dialer) Save() []byte {
	b, _ := json.Marshal(saved{d.Proxy(), d.cfg.Source, d.cfg.NoProxy, d.cfg.Credentials.Path()}) // strings always encode
	return append(b, '\n')
}

// Recall makes the Dialer that the daemon of a state folder uses, as far as its StateFile and the environment know it. Beside an error it is
// what is left of that: without user and password, or without a proxy.
func Recall(stateDir string, getenv func(string) string) (*Dialer, error) {
	b, err := os.ReadFile(filepath.Join(stateDir, StateFile))
	var s saved
	switch {
	case errors.Is(err, fs.ErrNotExist): // a daemon that has not run yet
		d, err := Settings{}.Open(getenv)
		if err != nil {
			d = new(Dialer)
		}
		return d, err
	case err != nil:
		return new(Dialer), fmt.Errorf("what proxy the daemon uses: %w", err)
	case json.Unmarshal(b, &s) != nil:
		return new(Dialer), fmt.Errorf("%s: malformed", filepath.Join(stateDir, StateFile))
	case s.Proxy == "":
		return new(Dialer), nil
	}
	cfg := Config{URL: s.Proxy, Source: s.Source, NoProxy: s.NoProxy}
	var missing error
	if s.Credentials != "" {
		cfg.Credentials, missing = readCredentials(s.Credentials, filepath.Base(s.Credentials) != systemdCredential)
	} else if env, err := (Settings{}).Open(getenv); err == nil && env.Proxy() == s.Proxy {
		cfg.Credentials = env.cfg.Credentials
	}
	d, err := New(cfg)
	if err != nil {
		d = new(Dialer)
	}
	return d, errors.Join(missing, err)
}
