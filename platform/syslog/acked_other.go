//go:build !linux

package syslog

import (
	"context"
	"net"
	"time"
)

// acknowledged does not know here: what was written counts as sent.
func acknowledged(context.Context, net.Conn, time.Duration) error { return nil }
