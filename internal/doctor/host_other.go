//go:build !linux

package doctor

import "sallyway/internal/daemon"

func buffers() []daemon.Check { return nil }
