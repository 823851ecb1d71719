package egress

import (
	"bufio"
	"bytes"
	"encoding/base64"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/textproto"
	"strings"
)

const (
	// maxHead bounds the head of an answer to CONNECT, in bytes. A proxy's has a few hundred; what it explains stands in the body.
	maxHead = 16 << 10
	// maxInterim bounds the 1xx answers before the final one (RFC 9110 §15.2).
	maxInterim = 4
	// maxReason bounds the reason phrase that an error repeats, in bytes.
	maxReason = 80
)

// connect asks an HTTP proxy for target and reads its answer, not a byte of what follows.
func (d *Dialer) connect(c io.ReadWriter, target string, creds credentials) error {
	var req bytes.Buffer
	fmt.Fprintf(&req, "CONNECT %s HTTP/1.1\r\nHost: %s\r\nUser-Agent: sallyway\r\n", target, target)
	if creds.user != "" {
		req.WriteString("Proxy-Authorization: Basic " + base64.StdEncoding.EncodeToString([]byte(creds.user+":"+creds.password)) + "\r\n")
	}
	req.WriteString("\r\n")
	if _, err := c.Write(req.Bytes()); err != nil {
		return d.broken(target, err)
	}
	a, err := readAnswer(c)
	if err != nil {
		return d.broken(target, err)
	}
	said := fmt.Sprintf("%d %s", a.status, a.reason)
	switch {
	case a.status/100 == 2:
		return nil
	case a.status == http.StatusProxyAuthRequired, a.status == http.StatusUnauthorized: // tinyproxy says 401 to a wrong password
		return d.unauthorized(a, creds)
	case a.status == http.StatusForbidden, a.status == http.StatusMethodNotAllowed, a.status == http.StatusNotImplemented,
		a.status == http.StatusUnavailableForLegalReasons:
		return &Error{Kind: Refused, Proxy: d.Proxy(), Reason: fmt.Sprintf("does not let this host connect to %s: %s", target, said), Remedy: "have the proxy allow CONNECT to " + target}
	}
	return &Error{Kind: NoWay, Proxy: d.Proxy(), Reason: fmt.Sprintf("does not lead to %s: %s", target, said), Remedy: "have the proxy's owner see whether it reaches " + target}
}

// unauthorized explains a 407 or 401.
func (d *Dialer) unauthorized(a answer, creds credentials) error {
	e := &Error{Kind: Auth, Proxy: d.Proxy(), Remedy: credentialsRemedy}
	schemes, basic := a.schemes()
	switch {
	case len(schemes) > 0 && !basic:
		e.Reason = fmt.Sprintf("wants to be authenticated to by %s, and Basic alone is spoken here (%d)", strings.Join(schemes, ", "), a.status)
		e.Remedy = "have the proxy's owner allow Basic, or exempt this host; or run a local proxy that authenticates to this one, and name that"
	case creds.user == "":
		e.Reason = fmt.Sprintf("wants a user and a password, and none are set (%d)", a.status)
	default:
		e.Reason = fmt.Sprintf("does not take user %.80q with this password (%d)", creds.user, a.status)
		e.Remedy = "correct user and password: " + creds.source
	}
	return e
}

// answer is the head of an answer to CONNECT.
type answer struct {
	status int
	reason string // printable, at most maxReason bytes
	header textproto.MIMEHeader
}

// schemes are the kinds of authentication that the proxy offers, the printable ones, a few of them; basic says whether Basic is among all.
func (a answer) schemes() (out []string, basic bool) {
	for _, v := range a.header.Values("Proxy-Authenticate") {
		name, _, _ := strings.Cut(strings.TrimSpace(v), " ")
		basic = basic || strings.EqualFold(name, "Basic")
		if name = printable(name, 20); name != "" && len(out) < 4 {
			out = append(out, name)
		}
	}
	return out, basic
}

var (
	errNotHTTP = errors.New("it does not begin like HTTP/1")
	errEndless = fmt.Errorf("its answer's head is larger than %d bytes", maxHead)
	errStatus  = errors.New("its answer has no valid status line")
	errInterim = errors.New("it goes on giving interim answers")
)

// readAnswer reads the final answer's head and nothing behind it: what is there belongs to the target.
func readAnswer(r io.Reader) (answer, error) {
	for range maxInterim {
		head, err := readHead(r)
		if err != nil {
			return answer{}, err
		}
		if a, err := parseHead(head); err != nil || a.status/100 != 1 {
			return a, err
		}
	}
	return answer{}, errInterim
}

// readHead reads a head byte by byte up to its empty line. Bare LF ends a line, too (RFC 9112 §2.2).
func readHead(r io.Reader) ([]byte, error) {
	const start = "HTTP/1."
	head := make([]byte, 0, 512)
	var b [1]byte
	for len(head) < maxHead {
		if _, err := io.ReadFull(r, b[:]); err != nil {
			return nil, err
		}
		head = append(head, b[0])
		if n := len(head); n <= len(start) && head[n-1] != start[n-1] {
			return nil, errNotHTTP
		}
		if b[0] == '\n' && (bytes.HasSuffix(head, []byte("\n\r\n")) || bytes.HasSuffix(head, []byte("\n\n"))) {
			return head, nil
		}
	}
	return nil, errEndless
}

// parseHead reads a head with its empty line: HTTP/1.x, three digits, a reason that may be missing (RFC 9112 §4), fields.
func parseHead(head []byte) (answer, error) {
	tp := textproto.NewReader(bufio.NewReader(bytes.NewReader(head)))
	line, err := tp.ReadLine()
	if err != nil {
		return answer{}, errStatus
	}
	version, rest, _ := strings.Cut(line, " ")
	code, reason, _ := strings.Cut(rest, " ")
	if len(version) != len("HTTP/1.1") || !strings.HasPrefix(version, "HTTP/1.") || len(code) != 3 || strings.Trim(code, "0123456789") != "" || code[0] == '0' {
		return answer{}, errStatus
	}
	a := answer{status: int(code[0]-'0')*100 + int(code[1]-'0')*10 + int(code[2]-'0'), reason: printable(reason, maxReason)}
	if a.header, err = tp.ReadMIMEHeader(); err != nil {
		return answer{}, errors.New("its answer has malformed fields")
	}
	return a, nil
}

// printable is s without what could disturb a log or a terminal, cut at most bytes.
func printable(s string, most int) string {
	s = strings.Map(func(r rune) rune {
		if r < ' ' || r > '~' {
			return -1
		}
		return r
	}, s)
	return s[:min(len(s), most)]
}
