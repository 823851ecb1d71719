package daemon

import (
	"io"
	"log/slog"
	"strings"
)

// NewLogger returns the program's log on w. Level is debug, info, warn or error; format is text or json. Both come
// from a user, so that an error is a usage error.
//
// A Secret hides itself. As a second line of defence the values of attributes that are named like secrets (token,
// password, authorization …) are hidden too, whatever their type.
func NewLogger(w io.Writer, level, format string) (*slog.Logger, error) {
	var l slog.Level
	switch strings.ToLower(level) {
	case "debug":
		l = slog.LevelDebug
	case "", "info":
		l = slog.LevelInfo
	case "warn":
		l = slog.LevelWarn
	case "error":
		l = slog.LevelError
	default:
		return nil, Usagef("unknown log level %q\nuse debug, info, warn or error", level)
	}
	o := &slog.HandlerOptions{Level: l, ReplaceAttr: redact}
	switch strings.ToLower(format) {
	case "", "text":
		return slog.New(slog.NewTextHandler(w, o)), nil
	case "json":
		return slog.New(slog.NewJSONHandler(w, o)), nil
	}
	return nil, Usagef("unknown log format %q\nuse text or json", format)
}

// secretNames are attribute names whose values are never logged. A name counts too when it ends in _ and one of them.
var secretNames = []string{"token", "password", "passphrase", "secret", "authorization", "cookie", "private_key", "credential"}

func redact(_ []string, a slog.Attr) slog.Attr {
	key := strings.ToLower(strings.ReplaceAll(a.Key, "-", "_"))
	for _, n := range secretNames {
		if key == n || strings.HasSuffix(key, "_"+n) {
			return slog.String(a.Key, redacted)
		}
	}
	return a
}
