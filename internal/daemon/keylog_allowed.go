//go:build keylog

package daemon

const keyLogAllowed = true
