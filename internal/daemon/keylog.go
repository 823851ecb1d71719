//go:build !keylog

package daemon

// keyLogAllowed is true only in builds with the tag keylog, which are for debugging and never released.
const keyLogAllowed = false
