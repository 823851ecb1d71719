package people

import (
	"net/http"
	"time"
)

// Limits of what is asked of providers of single sign-on.
const providerTimeout = 10 * time.Second

// providerClient makes requests to providers. It follows no redirects: a provider's documents are where its issuer says.
func providerClient() *http.Client {
	return &http.Client{
		Timeout:       providerTimeout,
		CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
	}
}

// providers are the providers that were asked for their documents lately.
type providers struct{}
