package ssm

import (
	"context"
	"encoding/json"
	"encoding/pem"
	"io"
	"maps"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"sallyway/internal/awsidentity"
	"sallyway/platform/awsauth/ststest"
)

// shop is a parameter store that checks signatures and serves two parameters a page.
type shop struct {
	*httptest.Server
	ca         string
	sts        *ststest.STS
	parameters [][2]string
	fail       []int // statuses of the next answers
	asked      int
}

func open(t *testing.T, parameters ...[2]string) *shop {
	t.Helper()
	s := &shop{sts: ststest.Start(t), parameters: parameters}
	s.sts.Set("AKID", ststest.User{Secret: "hush", Token: "session", ARN: "arn:aws:iam::123456789012:role/platform"})
	s.Server = httptest.NewTLSServer(http.HandlerFunc(s.serve))
	t.Cleanup(s.Close)
	s.ca = filepath.Join(t.TempDir(), "ca.pem")
	if err := os.WriteFile(s.ca, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: s.Certificate().Raw}), 0o600); err != nil {
		t.Fatal(err)
	}
	return s
}

func (s *shop) serve(w http.ResponseWriter, r *http.Request) {
	s.asked++
	if len(s.fail) > 0 {
		w.WriteHeader(s.fail[0])
		s.fail = s.fail[1:]
		return
	}
	body, _ := io.ReadAll(r.Body)
	if _, code := s.sts.Signed(r, body, "ssm"); code != "" {
		w.WriteHeader(http.StatusBadRequest)
		_ = json.NewEncoder(w).Encode(map[string]string{"__type": "com.amazon#" + code, "message": "no"})
		return
	}
	var ask struct {
		Path, NextToken string
		WithDecryption  bool
	}
	if json.Unmarshal(body, &ask) != nil || r.Header.Get("X-Amz-Target") != "AmazonSSM.GetParametersByPath" || !ask.WithDecryption {
		w.WriteHeader(http.StatusBadRequest)
		return
	}
	from := len(ask.NextToken)
	var page answer
	for i := from; i < len(s.parameters) && i < from+2; i++ {
		page.Parameters = append(page.Parameters, struct{ Name, Value string }{s.parameters[i][0], s.parameters[i][1]})
	}
	if from+2 < len(s.parameters) {
		page.NextToken = strings.Repeat("x", from+2)
	}
	_ = json.NewEncoder(w).Encode(page)
}

func (s *shop) config(secret string) Config {
	env := map[string]string{"AWS_ACCESS_KEY_ID": "AKID", "AWS_SECRET_ACCESS_KEY": secret, "AWS_SESSION_TOKEN": "session"}
	return Config{
		Region: ststest.Region, Endpoint: s.URL, CAFile: s.ca, pause: time.Millisecond,
		Find: func(ctx context.Context) (*awsidentity.Credentials, error) {
			return awsidentity.Find(ctx, awsidentity.Config{Getenv: func(k string) string { return env[k] }})
		},
	}
}

func TestRead(t *testing.T) {
	s := open(t, [2]string{"/sallyway/eu/listen", ":8443"}, [2]string{"/sallyway/eu/database", "postgres://u:secret@db/x"}, [2]string{"/sallyway/eu/advertise-url", "https://p.example"})
	s.fail = []int{http.StatusServiceUnavailable, http.StatusTooManyRequests}
	got, err := Read(t.Context(), "/sallyway/eu/", s.config("hush"))
	if err != nil {
		t.Fatal(err)
	}
	want := map[string]string{"listen": ":8443", "database": "postgres://u:secret@db/x", "advertise-url": "https://p.example"}
	if !maps.Equal(got, want) {
		t.Fatalf("got %v, want %v", got, want)
	}
	if s.asked != 4 {
		t.Errorf("%d requests, want two that failed and two pages", s.asked)
	}
}

func TestRefused(t *testing.T) {
	s := open(t)
	elsewhere := open(t, [2]string{"/other/database", "postgres://u:secret@db/x"})
	for _, tc := range []struct {
		name, path string
		change     func(*Config)
		want       string
	}{
		{"wrong key", "/sallyway/eu", func(c *Config) { c.Find = s.config("wrong").Find }, "SignatureDoesNotMatch"},
		{"nothing there", "/sallyway/eu", func(*Config) {}, "no parameters right below /sallyway/eu"},
		{"no path", "sallyway", func(*Config) {}, "not of the form"},
		{"path with a query", "/sallyway?x=1", func(*Config) {}, "not of the form"},
		{"plain HTTP", "/sallyway/eu", func(c *Config) { c.Endpoint = "http://127.0.0.1:1" }, "not https"},
		{"region that is a host", "/sallyway/eu", func(c *Config) { c.Region = "evil.example/" }, "is none"},
		{"unknown authority", "/sallyway/eu", func(c *Config) { c.CAFile = "" }, "certificate"},
		{"parameters of another path", "/sallyway/eu", func(c *Config) { c.Endpoint, c.CAFile = elsewhere.URL, elsewhere.ca }, "does not lie below"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			c := s.config("hush")
			tc.change(&c)
			elsewhere.sts.Set("AKID", ststest.User{Secret: "hush", Token: "session", ARN: "arn:aws:iam::123456789012:role/platform"})
			_, err := Read(t.Context(), tc.path, c)
			if err == nil || !strings.Contains(err.Error(), tc.want) {
				t.Fatalf("error %v, want one with %q", err, tc.want)
			}
			if strings.Contains(err.Error(), "secret") || strings.Contains(err.Error(), "hush") {
				t.Errorf("the error tells a secret: %v", err)
			}
		})
	}
}
