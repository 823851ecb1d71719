package syslog

import (
	"strconv"
	"strings"
	"time"
	"unicode/utf8"

	"sallyway/platform/store"
)

// Facility and severities of what is sent (RFC 5424 §6.2.1).
const (
	facility = 13 // log audit
	notice   = 5
	warning  = 4 // for what was refused
)

// enterprise names structured data of one's own (RFC 5424 §7.2.2). 32473 is the number that RFC 5612 sets aside for documentation: a number of our own
// is not registered, and a name without one would be the IANA's.
const enterprise = "audit@32473"

// maxField bounds a parameter in bytes, maxMessage a whole message: receivers take at least 2048 and should take 8192 (RFC 5424 §6.1).
const (
	maxField   = 1024
	maxDetail  = 4096
	maxMessage = 8192
)

// Message writes an audit entry of org as RFC 5424 has it: the entry stands in structured data, the text behind it is for people.
func Message(host, org string, e *store.AuditEntry) []byte {
	severity := notice
	if e.Result != "ok" {
		severity = warning
	}
	b := make([]byte, 0, 512)
	b = append(b, '<')
	b = strconv.AppendInt(b, facility*8+int64(severity), 10)
	b = append(b, ">1 "...)
	b = e.At.UTC().AppendFormat(b, "2006-01-02T15:04:05.000000Z07:00")
	b = append(b, ' ')
	b = append(b, header(host, 255)...)
	b = append(b, " sallyway - "...) // no process id: what sends it changes with the replica
	b = append(b, header(e.Action, 32)...)
	b = append(b, " ["+enterprise...)
	for _, p := range [][2]string{
		{"org", org}, {"seq", strconv.FormatInt(e.Seq, 10)}, {"actor", e.Actor}, {"action", e.Action}, {"object", e.Object}, {"result", e.Result}, {"hash", e.Hash},
	} {
		b = param(b, p[0], p[1], maxField)
	}
	b = param(b, "detail", string(e.Detail), maxDetail)
	b = append(b, "] "...)
	// The byte order mark says that the text is UTF-8 (§6.4).
	b = append(b, "\ufeff"...)
	b = append(b, plain(e.Action+" "+e.Object+" by "+e.Actor+": "+e.Result)...)
	if len(b) > maxMessage {
		b = b[:maxMessage]
		for len(b) > 0 && !utf8.Valid(b[max(0, len(b)-utf8.UTFMax):]) && !utf8.RuneStart(b[len(b)-1]) {
			b = b[:len(b)-1]
		}
	}
	return b
}

// header makes a field of the header: printable ASCII without spaces, "-" for nothing (§6).
func header(s string, most int) string {
	s = strings.Map(func(r rune) rune {
		if r <= ' ' || r > '~' {
			return '_'
		}
		return r
	}, s)
	if s == "" {
		return "-"
	}
	return s[:min(len(s), most)]
}

// param appends a parameter: its value in UTF-8 with ", \ and ] escaped (§6.3.3).
func param(b []byte, name, value string, most int) []byte {
	value = strings.ToValidUTF8(value, "\ufffd")
	if len(value) > most {
		value = strings.ToValidUTF8(value[:most], "") + "…"
	}
	b = append(b, ' ')
	b = append(b, name...)
	b = append(b, `="`...)
	for _, r := range value {
		if r == '"' || r == '\\' || r == ']' {
			b = append(b, '\\')
		}
		if r < ' ' || r == 0x7f {
			r = ' ' // it may stand here, and receivers make lines of it all the same
		}
		b = utf8.AppendRune(b, r)
	}
	return append(b, '"')
}

// plain takes control characters out of text: a receiver writes lines.
func plain(s string) string {
	return strings.Map(func(r rune) rune {
		if r < ' ' || r == 0x7f {
			return ' '
		}
		return r
	}, strings.ToValidUTF8(s, "\ufffd"))
}

// frame puts the length before a message (RFC 5425 §4.3, RFC 6587 §3.4.1): octets, so that a message may hold anything.
func frame(b, message []byte) []byte {
	b = strconv.AppendInt(b, int64(len(message)), 10)
	b = append(b, ' ')
	return append(b, message...)
}

// connectTimeout bounds connecting, writeTimeout a batch until the receiver's host has it.
const (
	connectTimeout = 10 * time.Second
	writeTimeout   = 20 * time.Second
)
