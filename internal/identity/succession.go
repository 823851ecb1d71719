package identity

import (
	"crypto/x509"
	"fmt"
	"slices"
)

// IsRoot says whether a certificate is one of a root: a CA that may have CAs below it, for every usage. An intermediate is none, so that its
// key makes no roots.
func IsRoot(c *x509.Certificate) bool {
	return c.IsCA && c.BasicConstraintsValid && c.MaxPathLen != 0 && len(c.ExtKeyUsage)+len(c.UnknownExtKeyUsage) == 0
}

// Succession says whether roots may take the place of known ones: each is known already, or is signed by one that is, through any of links.
// A root that follows another has a certificate that the other's key signed. Links are followed and not trusted: they are roots that were in
// between. The error names the first root that nothing leads to.
func Succession(known, shown, links []*x509.Certificate) error {
	trusted := slices.Clone(known)
	rest := slices.DeleteFunc(slices.Concat(shown, links), func(c *x509.Certificate) bool { return !IsRoot(c) })
	for more := true; more; {
		more = false
		rest = slices.DeleteFunc(rest, func(c *x509.Certificate) bool {
			if !slices.ContainsFunc(trusted, func(k *x509.Certificate) bool {
				return k.Equal(c) || (IsRoot(k) && c.CheckSignatureFrom(k) == nil)
			}) {
				return false
			}
			trusted, more = append(trusted, c), true
			return true
		})
	}
	for _, c := range shown {
		if !slices.ContainsFunc(trusted, c.Equal) {
			return &SuccessionError{Root: CertificateKeyHash(c)}
		}
	}
	return nil
}

// SuccessionError says that a root follows none that is known.
type SuccessionError struct{ Root KeyHash }

// Error implements error.
func (e *SuccessionError) Error() string {
	return fmt.Sprintf("the root %v is neither known nor signed by one that is", e.Root)
}
