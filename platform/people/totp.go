package people

import (
	"crypto/hmac"
	"crypto/rand"
	"crypto/sha1" //nolint:gosec // RFC 6238 as authenticator programs implement it; an HMAC does not need collision resistance
	"crypto/subtle"
	"encoding/base32"
	"encoding/binary"
	"fmt"
	"net/url"
	"strings"
	"time"
)

// TOTP (RFC 6238): six digits of HMAC-SHA-1 over the count of periods of 30 s since 1970, as every authenticator program has it.
const (
	totpPeriod = 30 * time.Second
	totpDigits = 6
	totpSecret = 20 // bytes, the size of SHA-1 (RFC 4226 §4)
	totpSkew   = 1  // periods before and after that are accepted (RFC 6238 §5.2)
)

func totpStep(now time.Time) int64 { return now.Unix() / int64(totpPeriod/time.Second) }

// totpCode is the code of a time step (RFC 4226 §5.3).
func totpCode(secret []byte, step int64) string {
	var msg [8]byte
	binary.BigEndian.PutUint64(msg[:], uint64(step))
	mac := hmac.New(sha1.New, secret)
	mac.Write(msg[:])
	sum := mac.Sum(nil)
	at := sum[len(sum)-1] & 0x0f
	v := binary.BigEndian.Uint32(sum[at:]) & 0x7fffffff
	return fmt.Sprintf("%0*d", totpDigits, v%1_000_000)
}

// totpMatch finds the time step around now whose code is code. All are compared, so that time tells nothing.
func totpMatch(secret []byte, code string, now time.Time) (step int64, ok bool) {
	code = strings.Join(strings.Fields(code), "")
	for d := int64(-totpSkew); d <= totpSkew; d++ {
		s := totpStep(now) + d
		if subtle.ConstantTimeCompare([]byte(totpCode(secret, s)), []byte(code)) == 1 {
			step, ok = s, true
		}
	}
	return step, ok
}

var base32Plain = base32.StdEncoding.WithPadding(base32.NoPadding)

// totpURL is what authenticator programs read as a QR code (the key URI format).
func totpURL(issuer, login string, secret []byte) string {
	q := url.Values{"secret": {base32Plain.EncodeToString(secret)}, "issuer": {issuer}}
	return "otpauth://totp/" + url.PathEscape(issuer+":"+login) + "?" + q.Encode()
}

// Recovery codes: fifty random bits each, shown once, good for one login each.
const (
	recoveryCodes  = 10
	recoveryDigits = 10
)

// words makes a random text of n letters and digits that are not mistaken for each other, in groups.
func words(n, group int) string {
	const alphabet = "0123456789abcdefghjkmnpqrstvwxyz" // of Crockford: no i, l, o, u
	b := make([]byte, n)
	_, _ = rand.Read(b) // never fails (crypto/rand)
	var out strings.Builder
	for i, c := range b {
		if i > 0 && i%group == 0 {
			out.WriteByte('-')
		}
		out.WriteByte(alphabet[c&31])
	}
	return out.String()
}

// plain takes away what people add to a code of words: spaces, hyphens, capitals, and letters for the digits that they look like.
func plain(code string) string {
	return strings.Map(func(r rune) rune {
		switch {
		case r == 'o':
			return '0'
		case r == 'i', r == 'l':
			return '1'
		case r == '-' || r == ' ' || r == '\t':
			return -1
		}
		return r
	}, strings.ToLower(code))
}
