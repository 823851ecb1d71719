package tunnel

import "net/http"

// HTTP is how a proxy named proxy answers a request that failed with e: the status and the value of the Proxy-Status field.
func (e *ProxyError) HTTP(proxy string) (status int, proxyStatus string) {
	h := http.Header{}
	e.header(h, proxy)
	return e.status(), h.Get(proxyStatusHeader)
}
