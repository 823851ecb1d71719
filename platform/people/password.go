package people

import (
	"context"
	"crypto/rand"
	"crypto/subtle"
	"encoding/base64"
	"fmt"
	"net/http"
	"runtime"
	"strings"
	"unicode"
	"unicode/utf8"

	"golang.org/x/crypto/argon2"

	"sallyway/internal/control"
	"sallyway/platform/registry"
)

// Limits of passwords.
const (
	minPassword = 12  // characters
	maxPassword = 256 // bytes
)

// cost are the parameters of argon2id (RFC 9106). They stand with every hash, so that they can grow; a login renews an older hash.
type cost struct {
	memory  uint32 // KiB
	time    uint32
	threads uint8
}

// current is the second choice of the OWASP password storage cheat sheet: about 30 ms.
var current = cost{memory: 19 << 10, time: 2, threads: 1}

const (
	saltSize = 16
	hashSize = 32
)

// hasher computes hashes, few at once: each takes memory and a core.
type hasher struct {
	turns   chan struct{}
	waiting chan struct{}
	nobody  string // a hash that no password has, for logins that do not exist
}

// maxWaiting is how many logins wait for their turn; more are told to come again.
const maxWaiting = 64

func newHasher() hasher {
	n := max(2, runtime.GOMAXPROCS(0))
	h := hasher{turns: make(chan struct{}, n), waiting: make(chan struct{}, n+maxWaiting)}
	salt := make([]byte, saltSize)
	_, _ = rand.Read(salt) // never fails (crypto/rand)
	h.nobody = encodeHash(current, salt, make([]byte, hashSize))
	return h
}

func (h *hasher) turn(ctx context.Context) (func(), error) {
	select {
	case h.waiting <- struct{}{}:
	default:
		return nil, registry.Refuse(http.StatusTooManyRequests, control.CodeRateLimited, "try again in a few seconds", "too many logins at once")
	}
	select {
	case h.turns <- struct{}{}:
		return func() { <-h.turns; <-h.waiting }, nil
	case <-ctx.Done():
		<-h.waiting
		return nil, ctx.Err()
	}
}

// make hashes a new password.
func (h *hasher) make(ctx context.Context, password string) (string, error) {
	done, err := h.turn(ctx)
	if err != nil {
		return "", err
	}
	defer done()
	salt := make([]byte, saltSize)
	_, _ = rand.Read(salt) // never fails (crypto/rand)
	return encodeHash(current, salt, argon2.IDKey([]byte(password), salt, current.time, current.memory, current.threads, hashSize)), nil
}

// check compares a password with a hash; an empty hash takes as long and never matches. renew says that the hash is of older parameters.
func (h *hasher) check(ctx context.Context, encoded, password string) (ok, renew bool, err error) {
	done, err := h.turn(ctx)
	if err != nil {
		return false, false, err
	}
	defer done()
	known := encoded != ""
	if !known {
		encoded = h.nobody
	}
	c, salt, want, err := decodeHash(encoded)
	if err != nil {
		return false, false, err
	}
	if len(password) > maxPassword {
		password, known = "", false
	}
	got := argon2.IDKey([]byte(password), salt, c.time, c.memory, c.threads, uint32(len(want)))
	return subtle.ConstantTimeCompare(got, want) == 1 && known, c != current, nil
}

func encodeHash(c cost, salt, hash []byte) string {
	b := base64.RawStdEncoding
	return fmt.Sprintf("$argon2id$v=%d$m=%d,t=%d,p=%d$%s$%s", argon2.Version, c.memory, c.time, c.threads, b.EncodeToString(salt), b.EncodeToString(hash))
}

func decodeHash(s string) (c cost, salt, hash []byte, err error) {
	parts := strings.Split(s, "$")
	var version int
	if len(parts) != 6 || parts[1] != "argon2id" {
		return c, nil, nil, fmt.Errorf("password hash of an unknown kind")
	}
	if _, err := fmt.Sscanf(parts[2], "v=%d", &version); err != nil || version != argon2.Version {
		return c, nil, nil, fmt.Errorf("password hash of argon2 version %.10q", parts[2])
	}
	if _, err := fmt.Sscanf(parts[3], "m=%d,t=%d,p=%d", &c.memory, &c.time, &c.threads); err != nil || c.memory > 1<<20 || c.time == 0 || c.time > 64 || c.threads == 0 {
		return c, nil, nil, fmt.Errorf("password hash with parameters %.40q", parts[3])
	}
	b := base64.RawStdEncoding
	if salt, err = b.DecodeString(parts[4]); err != nil {
		return c, nil, nil, fmt.Errorf("salt of a password hash: %w", err)
	}
	if hash, err = b.DecodeString(parts[5]); err != nil || len(hash) < 16 {
		return c, nil, nil, fmt.Errorf("password hash is damaged")
	}
	return c, salt, hash, nil
}

// CheckPassword refuses passwords that are guessed first. about are the person's own words, such as the login.
func CheckPassword(password string, about ...string) error {
	const remedy = "four or five words that have nothing to do with each other are long, strong and easy to remember"
	bad := func(format string, args ...any) error {
		return registry.Invalid("body.password", remedy, format, args...)
	}
	switch n := utf8.RuneCountInString(password); {
	case !utf8.ValidString(password):
		return bad("the password is not UTF-8")
	case n < minPassword:
		return bad("the password has %d characters, at least %d are needed", n, minPassword)
	case len(password) > maxPassword:
		return bad("the password has %d bytes, limit %d", len(password), maxPassword)
	}
	lower := strings.ToLower(password)
	different := map[rune]bool{}
	for _, r := range lower {
		different[r] = true
	}
	if len(different) < 5 {
		return bad("the password has %d different characters only", len(different))
	}
	for _, a := range about {
		a, _, _ = strings.Cut(strings.ToLower(a), "@")
		if len(a) >= 3 && strings.Contains(lower, a) && utf8.RuneCountInString(lower)-utf8.RuneCountInString(a) < minPassword-4 {
			return bad("the password is little more than your name")
		}
	}
	if base := bare(lower); common[base] || common[lower] {
		return bad("the password is one of those that are guessed first")
	}
	return nil
}

// bare undoes the usual disguises of a common word: digits and signs around it, and letters written as digits.
func bare(s string) string {
	s = strings.TrimFunc(s, func(r rune) bool { return !unicode.IsLetter(r) })
	s = strings.NewReplacer("0", "o", "1", "l", "3", "e", "4", "a", "5", "s", "7", "t", "@", "a", "$", "s", "!", "i", " ", "", "-", "", "_", "", ".", "").Replace(s)
	// A word that is written twice is that word.
	if half := len(s) / 2; len(s)%2 == 0 && half > 0 && s[:half] == s[half:] {
		s = s[:half]
	}
	return s
}

// common are words that passwords of twelve characters and more are made of most often, bare.
var common = func() map[string]bool {
	out := map[string]bool{}
	for _, w := range strings.Fields(`password passwords passwort motdepasse contrasena wachtwoord parola passphrase mypassword newpassword thepassword yourpassword
		password123456 changeme changemenow changethis letmein letmeinnow letmeinplease welcome welcometo welcomehome administrator administrador admin root superuser
		adminadmin rootroot adminpassword rootpassword iloveyou iloveyouforever ilovemyself qwerty qwertyuiop qwertyuiopasdfghjkl qwertzuiop azertyuiop asdfghjkl zxcvbnm
		qwertyqwerty qazwsxedc qazwsxedcrfv qweasdzxc poiuytrewq abcdefgh abcdefghij abcdefghijkl abcdefghijklmnop abcdefghijklmnopqrstuvwxyz abcabcabc sunshine princess
		football baseball basketball superman batman starwars trustnol trustnoone whatever whateverit dragon monkey master shadow michael jennifer jordan liverpool chelsea
		arsenal manchester barcelona computer internet samsung google facebook microsoft corporate company secret secretpassword topsecret supersecret default defaultpassword
		summer winter spring autumn january february november december monday freedom forever nothing everything incorrect correcthorsebatterystaple sallyway relay gateway
		platform kubernetes postgres database server network security temporary temppassword testtest testpassword testing onetwothreefour`) {
		out[w] = true
	}
	for _, w := range []string{
		"123456789012", "1234567890123", "12345678901234", "123456781234", "1q2w3e4r5t6y", "1qaz2wsx3edc", "qwerty123456", "123456qwerty", "q1w2e3r4t5y6", "123qweasdzxc", "abc123abc123",
		"098765432109", "987654321098", "112233445566", "123123123123", "a1b2c3d4e5f6", "zaq12wsxcde3",
	} {
		out[w] = true
	}
	return out
}()
