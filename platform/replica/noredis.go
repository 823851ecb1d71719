//go:build noredis

package replica

import (
	"context"
	"errors"
	"sync/atomic"
	"time"
)

// Where every byte counts, as in the appliance's image, the program is built without the client of Redis. One machine needs none, and replicas on one
// PostgreSQL go on by the database.

var errNoRedis = errors.New("this build has no Redis: leave the URL out, replicas go on by the database")

// redisLink is never made.
type redisLink struct {
	client nothing
	prefix string
	up     atomic.Bool
	turned chan struct{}
}

type nothing struct{}

func (nothing) Close() error { return nil }

// CheckURL says that there is no Redis.
func CheckURL(string) error { return errNoRedis }

func openRedis(string) (*redisLink, error) { return nil, errNoRedis }

func (*redisLink) lease(context.Context, string, string, time.Duration) (bool, error) {
	return false, errNoRedis
}

func (*redisLink) drop(context.Context, string, string) error { return errNoRedis }

func (*Group) receive(context.Context) error { return errNoRedis }

func (*Group) send(context.Context) error { return errNoRedis }
