package entitlement

import (
	"encoding/base64"
	"errors"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"testing"
	"time"

	"github.com/go-jose/go-jose/v4"
)

var at = time.Date(2026, 3, 4, 5, 6, 7, 0, time.UTC)

func sample() *Entitlement {
	ten, two := int64(10), int64(2)
	return &Entitlement{
		ID: "e-1", Serial: 3, Issuer: "issuer", Customer: "Acme & <Söhne>", Platform: "i-1", Organization: "prod", Limits: Limits{Gateways: &ten, Relays: &two},
		Features: []string{"sso"}, Issued: at, NotBefore: at, Expires: at.AddDate(1, 0, 0), Contact: "sales@example.com",
	}
}

func newKey(t testing.TB) *Key {
	t.Helper()
	k, err := NewKey()
	if err != nil {
		t.Fatal(err)
	}
	return k
}

func sign(t testing.TB, k *Key, e *Entitlement) string {
	t.Helper()
	s, err := k.Sign(e)
	if err != nil {
		t.Fatal(err)
	}
	return s
}

func TestSignedAndOpened(t *testing.T) {
	k, next := newKey(t), newKey(t)
	jws := sign(t, k, sample())
	got, err := Trust{next.Public(), k.Public()}.Open(" " + jws + "\n")
	if err != nil {
		t.Fatal(err)
	}
	if !reflect.DeepEqual(got, sample()) {
		t.Errorf("got %+v, want %+v", got, sample())
	}
	again, err := KeyOf(k.Seed())
	if err != nil || again.Public().ID() != k.Public().ID() {
		t.Errorf("key of its seed: %v", err)
	}
}

// TestForged changes what is signed in every way that a forger has.
func TestForged(t *testing.T) {
	k := newKey(t)
	trust := Trust{k.Public()}
	jws := sign(t, k, sample())
	parts := strings.Split(jws, ".")
	more := sample()
	*more.Limits.Gateways = 1000
	payload, err := more.encode()
	if err != nil {
		t.Fatal(err)
	}
	other := sign(t, newKey(t), more)
	otherParts := strings.Split(other, ".")
	hmac, err := jose.NewSigner(jose.SigningKey{Algorithm: jose.HS256, Key: []byte(k.Public())}, (&jose.SignerOptions{}).WithType(typ).WithHeader("kid", k.Public().ID()))
	if err != nil {
		t.Fatal(err)
	}
	mac, err := hmac.Sign(payload)
	if err != nil {
		t.Fatal(err)
	}
	macText, err := mac.CompactSerialize()
	if err != nil {
		t.Fatal(err)
	}
	b64 := base64.RawURLEncoding.EncodeToString
	for what, s := range map[string]string{
		"another key":             other,
		"more in it":              parts[0] + "." + b64(payload) + "." + parts[2],
		"header of the right key": parts[0] + "." + otherParts[1] + "." + otherParts[2],
		"no signature":            parts[0] + "." + parts[1] + ".",
		"none":                    b64([]byte(`{"alg":"none","kid":"`+k.Public().ID()+`","typ":"`+typ+`"}`)) + "." + b64(payload) + ".",
		"HMAC by the public key":  macText,
		"nothing":                 "",
		"text":                    "hello",
		"long":                    strings.Repeat("a", MaxDocument+1),
	} {
		if e, err := trust.Open(s); err == nil {
			t.Errorf("%s: opened %+v", what, e)
		}
	}
	if _, err := trust.Open(other); !errors.Is(err, ErrUntrusted) {
		t.Errorf("another key: %v", err)
	}
	if _, err := Trust(nil).Open(jws); !errors.Is(err, ErrUntrusted) {
		t.Errorf("no trust: %v", err)
	}
}

// TestOneEncoding signs what a document is not: the signature is right, the content is refused.
func TestOneEncoding(t *testing.T) {
	k := newKey(t)
	good, err := sample().encode()
	if err != nil {
		t.Fatal(err)
	}
	text := string(good)
	for what, payload := range map[string]string{
		"unknown member": strings.Replace(text, `"serial"`, `"seats":1,"serial"`, 1),
		"twice":          strings.Replace(text, `"serial":3`, `"serial":3,"serial":4`, 1),
		"other case":     strings.Replace(text, `"serial"`, `"Serial"`, 1),
		"spaces":         strings.Replace(text, `"serial":3`, `"serial": 3`, 1),
		"other zone":     strings.Replace(text, `05:06:07Z`, `06:06:07+01:00`, 1),
		"more behind it": text + text,
		"negative limit": strings.Replace(text, `"gateways":10`, `"gateways":-1`, 1),
		"no serial":      strings.Replace(text, `"serial":3`, `"serial":0`, 1),
		"no one":         strings.Replace(text, `"organization":"prod"`, `"organization":""`, 1),
		"control":        strings.Replace(text, `"prod"`, `"pr\nod"`, 1),
	} {
		if payload == text {
			t.Fatalf("%s changes nothing", what)
		}
		signer, err := jose.NewSigner(jose.SigningKey{Algorithm: jose.EdDSA, Key: k.private}, (&jose.SignerOptions{}).WithType(typ).WithHeader("kid", k.Public().ID()))
		if err != nil {
			t.Fatal(err)
		}
		sig, err := signer.Sign([]byte(payload))
		if err != nil {
			t.Fatal(err)
		}
		jws, err := sig.CompactSerialize()
		if err != nil {
			t.Fatal(err)
		}
		if e, err := (Trust{k.Public()}).Open(jws); err == nil {
			t.Errorf("%s: opened %+v", what, e)
		}
	}
}

func TestPlaceAndTime(t *testing.T) {
	e := sample()
	for _, tc := range []struct {
		platform, org string
		want          error
	}{{"i-1", "prod", nil}, {"i-2", "prod", ErrElsewhere}, {"i-1", "test", ErrElsewhere}} {
		if err := e.For(tc.platform, tc.org); !errors.Is(err, tc.want) {
			t.Errorf("%s %s: %v", tc.platform, tc.org, err)
		}
	}
	e.Platform = ""
	if err := e.For("i-2", "prod"); err != nil {
		t.Errorf("any platform: %v", err)
	}
	for _, tc := range []struct {
		now  time.Time
		want error
	}{
		{at, nil},
		{at.Add(-4 * time.Minute), nil},
		{at.Add(-6 * time.Minute), ErrEarly},
		{e.Expires.Add(-time.Second), nil},
		{e.Expires, ErrExpired},
		{e.Expires.AddDate(10, 0, 0), ErrExpired},
	} {
		if err := e.Valid(tc.now); !errors.Is(err, tc.want) {
			t.Errorf("%v: %v, want %v", tc.now, err, tc.want)
		}
	}
}

func TestTrustOfFiles(t *testing.T) {
	a, b := newKey(t).Public(), newKey(t).Public()
	file := filepath.Join(t.TempDir(), "trust")
	if err := os.WriteFile(file, []byte("# ours\n"+a.String()+" # now\n\n"+b.String()+"\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	got, err := ParseTrust([]string{a.String(), file})
	if err != nil || len(got) != 2 || got[1].ID() != b.ID() {
		t.Errorf("%v %v", got, err)
	}
	for _, bad := range []string{"ed25519:", "ed25519:AAAA", filepath.Join(t.TempDir(), "none"), "rsa:AAAA"} {
		if _, err := ParseTrust([]string{bad}); err == nil {
			t.Errorf("%q is taken for a key", bad)
		}
	}
}

// FuzzOpen looks for a document that is opened without being in its one encoding, and for panics. The corpus is signed by the key of a seed of zeros,
// and payloads are signed anew, so that the fuzzer gets behind the signature.
func FuzzOpen(f *testing.F) {
	k, err := KeyOf(make([]byte, 32))
	if err != nil {
		f.Fatal(err)
	}
	good, err := sample().encode()
	if err != nil {
		f.Fatal(err)
	}
	f.Add(sign(f, k, sample()), good)
	f.Add("a.b.c", []byte(`{}`))
	f.Add("", []byte(`{"id":"e","serial":1,"limits":{"gateways":1e3}}`))
	signer, err := jose.NewSigner(jose.SigningKey{Algorithm: jose.EdDSA, Key: k.private}, (&jose.SignerOptions{}).WithType(typ).WithHeader("kid", k.Public().ID()))
	if err != nil {
		f.Fatal(err)
	}
	trust := Trust{k.Public()}
	f.Fuzz(func(t *testing.T, jws string, payload []byte) {
		_, _ = trust.Open(jws)
		sig, err := signer.Sign(payload)
		if err != nil {
			t.Skip()
		}
		text, err := sig.CompactSerialize()
		if err != nil {
			t.Skip()
		}
		e, err := trust.Open(text)
		if err != nil {
			return
		}
		again, err := e.encode()
		if err != nil || string(again) != string(payload) {
			t.Errorf("opened %q, which is %q, %v", payload, again, err)
		}
	})
}
