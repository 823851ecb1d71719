package config

import (
	"errors"
	"fmt"
	"reflect"
	"strings"

	"sallyway/internal/daemon"
)

// Found is what one source had.
type Found struct {
	Source string   // smbios, fw_cfg, nocloud, state, cmdline, metadata
	Where  string   // the device or the service, for people; may be ""
	Config *Config  // nil when it has none
	Notes  []string // for the console: what was passed over, and why
	Err    error    // it has a configuration that is wrong
}

// title names the source for people.
func (f Found) title() string {
	if f.Where != "" {
		return f.Source + " (" + f.Where + ")"
	}
	return f.Source
}

// Result is what an appliance goes by.
type Result struct {
	Config *Config // nil: unconfigured
	Source string  // of the configuration
	Token  string  // the source of the token; "" where there is none
	Notes  []string
	Errs   []error
}

// Choose picks among what the sources had, in their order. The first configuration wins, and the others are named in the notes. A source
// that has a token alone gives it to the first configuration of the same role; where there is none, the token is one. A source whose
// configuration is wrong is passed over with its error, so that a typing error in a seed leaves a running node as it was.
func Choose(found []Found) Result {
	var r Result
	var token *Found
	for i := range found {
		f := &found[i]
		r.Notes = append(r.Notes, f.Notes...)
		switch {
		case errors.Is(f.Err, ErrEmpty), f.Err == nil && f.Config == nil:
			continue
		case f.Err != nil:
			r.Errs = append(r.Errs, fmt.Errorf("%s: %w", f.title(), f.Err))
			continue
		}
		switch alone := f.Config.tokenAlone(); {
		case r.Config == nil && alone && token == nil:
			token = f
		case r.Config == nil && !alone && (token == nil || token.Config.Role == f.Config.Role):
			c := *f.Config
			r.Config, r.Source = &c, f.title()
			if c.Token != "" {
				r.Token = f.title()
			}
		default:
			r.Notes = append(r.Notes, fmt.Sprintf("%s has a configuration, too, which is passed over", f.title()))
		}
	}
	if token != nil {
		if r.Config == nil {
			c := *token.Config
			r.Config, r.Source = &c, token.title()
		}
		r.Config.Token, r.Token = token.Config.Token, token.title()
	}
	return r
}

// tokenAlone says that a configuration has nothing but a token.
func (c *Config) tokenAlone() bool {
	if c.Token == "" || c.HealthListen != "" || c.AdminKey != "" || !c.Network.IsZero() || !c.Update.IsZero() {
		return false
	}
	for _, d := range c.Daemons {
		if len(d) > 0 {
			return false
		}
	}
	bare := Config{Token: c.Token, Daemons: map[Role]map[string]any{}}
	if bare.validate() != nil {
		return false
	}
	bare.Daemons = c.Daemons
	return reflect.DeepEqual(&bare, c)
}

// withToken parses a document and sets a token that came beside it. Without both there is no configuration.
func withToken(doc []byte, token string) (*Config, error) {
	var c *Config
	if len(doc) > 0 {
		// The role may be missing in a document whose token comes apart.
		var err error
		if c, err = parseBeside(doc, token); err != nil && !errors.Is(err, ErrEmpty) {
			return nil, err
		}
	}
	if c == nil && token != "" {
		c = &Config{Token: daemon.Secret(token), Daemons: map[Role]map[string]any{}}
		if err := c.validate(); err != nil {
			return nil, err
		}
	}
	return c, nil
}

// parseBeside is Parse of a document with the token that lies beside it, where it has none of its own.
func parseBeside(doc []byte, token string) (*Config, error) {
	doc = unwrapped(doc)
	if token == "" {
		return Parse(doc)
	}
	if strings.ContainsAny(token, "\n\r\"'\\{}") {
		return nil, errors.New("token: has characters that no token has: copy it whole")
	}
	if hasKey(doc, "token") {
		return Parse(doc)
	}
	n, err := mapping(doc)
	if err != nil {
		return nil, err
	}
	n.Content = append(n.Content, scalar("token"), scalar(token))
	return parseNode(n)
}
