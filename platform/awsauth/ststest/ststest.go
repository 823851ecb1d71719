// Package ststest is an STS for tests: it answers GetCallerIdentity over TLS to whoever has signed the request (AWS Signature Version 4) with
// a key that it knows. It checks signatures with code of its own.
package ststest

import (
	"crypto/hmac"
	"crypto/sha256"
	"encoding/hex"
	"encoding/pem"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"sallyway/platform/awsauth"
)

// Region is the region that requests are signed for.
const Region = "eu-central-1"

// User is whose a key is.
type User struct{ Secret, Token, ARN string }

// STS is a server. Answer replaces its answers while it is not nil.
type STS struct {
	*httptest.Server
	CAFile string
	Asked  atomic.Int64
	Answer atomic.Pointer[http.HandlerFunc]

	mu    sync.Mutex
	users map[string]User // by access key; guarded by mu
}

// Start serves until the test ends.
func Start(t testing.TB) *STS {
	t.Helper()
	s := &STS{users: make(map[string]User)}
	s.Server = httptest.NewTLSServer(http.HandlerFunc(s.serve))
	t.Cleanup(s.Close)
	s.CAFile = filepath.Join(t.TempDir(), "sts-ca.pem")
	b := pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: s.Certificate().Raw})
	if err := os.WriteFile(s.CAFile, b, 0o600); err != nil {
		t.Fatal(err)
	}
	return s
}

// Config is for the platform that asks it.
func (s *STS) Config() awsauth.Config {
	return awsauth.Config{Region: Region, Endpoint: s.URL, CAFile: s.CAFile}
}

// Set makes accessKey a user's.
func (s *STS) Set(accessKey string, u User) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.users[accessKey] = u
}

func (s *STS) serve(w http.ResponseWriter, r *http.Request) {
	s.Asked.Add(1)
	if f := s.Answer.Load(); f != nil {
		(*f)(w, r)
		return
	}
	arn, code := s.who(r)
	if code != "" {
		w.WriteHeader(http.StatusForbidden)
		fmt.Fprintf(w, "<ErrorResponse xmlns=%q><Error><Type>Sender</Type><Code>%s</Code><Message>no</Message></Error></ErrorResponse>", "https://sts.amazonaws.com/doc/2011-06-15/", code)
		return
	}
	_, _ = io.WriteString(w, Result(arn))
}

// Result is STS's answer for an ARN.
func Result(arn string) string {
	return fmt.Sprintf(`<GetCallerIdentityResponse xmlns="https://sts.amazonaws.com/doc/2011-06-15/">
  <GetCallerIdentityResult><Arn>%s</Arn><UserId>AROAEXAMPLE:i-0</UserId><Account>%s</Account></GetCallerIdentityResult>
  <ResponseMetadata><RequestId>01234567-89ab-cdef-0123-456789abcdef</RequestId></ResponseMetadata>
</GetCallerIdentityResponse>`, arn, strings.Split(arn, ":")[4])
}

// who says whose identity is asked for.
func (s *STS) who(r *http.Request) (arn, code string) {
	body, err := io.ReadAll(r.Body)
	if err != nil || r.Method != http.MethodPost || r.URL.Path != "/" || string(body) != "Action=GetCallerIdentity&Version=2011-06-15" {
		return "", "InvalidAction"
	}
	return s.Signed(r, body, "sts")
}

// Signed checks the signature of a POST for a service from what arrived, and says whose it is or why it is nobody's.
func (s *STS) Signed(r *http.Request, body []byte, service string) (arn, code string) {
	var fields [3]string
	rest, ok := strings.CutPrefix(r.Header.Get("Authorization"), "AWS4-HMAC-SHA256 ")
	for i, name := range []string{"Credential=", "SignedHeaders=", "Signature="} {
		part, after, _ := strings.Cut(rest, ", ")
		var has bool
		fields[i], has = strings.CutPrefix(part, name)
		ok, rest = ok && has, after
	}
	scope := strings.Split(fields[0], "/")
	if !ok || len(scope) != 5 {
		return "", "IncompleteSignature"
	}
	s.mu.Lock()
	u, known := s.users[scope[0]]
	s.mu.Unlock()
	if !known || r.Header.Get("X-Amz-Security-Token") != u.Token {
		return "", "InvalidClientTokenId"
	}
	at, err := time.Parse("20060102T150405Z", r.Header.Get("X-Amz-Date"))
	if err != nil || time.Since(at).Abs() > 15*time.Minute || at.Format("20060102") != scope[1] || scope[2] != Region || scope[3] != service {
		return "", "SignatureDoesNotMatch"
	}
	names := strings.Split(fields[1], ";")
	if !slices.IsSorted(names) || !slices.Contains(names, "host") {
		return "", "SignatureDoesNotMatch"
	}
	canonical := "POST\n/\n\n"
	for _, n := range names {
		v := r.Header.Get(n)
		if n == "host" {
			v = r.Host
		}
		canonical += n + ":" + strings.TrimSpace(v) + "\n"
	}
	sum := func(b string) string { h := sha256.Sum256([]byte(b)); return hex.EncodeToString(h[:]) }
	canonical += "\n" + fields[1] + "\n" + sum(string(body))
	text := "AWS4-HMAC-SHA256\n" + r.Header.Get("X-Amz-Date") + "\n" + strings.Join(scope[1:], "/") + "\n" + sum(canonical)
	key := []byte("AWS4" + u.Secret)
	for _, part := range append(scope[1:], text) {
		m := hmac.New(sha256.New, key)
		_, _ = io.WriteString(m, part) // a hash takes everything
		key = m.Sum(nil)
	}
	if !hmac.Equal([]byte(hex.EncodeToString(key)), []byte(fields[2])) {
		return "", "SignatureDoesNotMatch"
	}
	return u.ARN, ""
}
