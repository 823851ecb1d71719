//go:build !noredis

package replica

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"sync"
	"sync/atomic"
	"time"

	"github.com/redis/go-redis/v9"
	"github.com/redis/go-redis/v9/maintnotifications"
)

// Limits of what goes through Redis.
const (
	redisAgain = 500 * time.Millisecond // between tries to reach it
	quiet      = 5 * time.Second        // without a message the connection is asked whether it lives
	messageMax = 1000                   // events in one message
	sealLabel  = "replica"              // under which messages are sealed
)

// redisLink is the connection to Redis.
type redisLink struct {
	client *redis.Client
	prefix string        // of keys and channels; set before use
	up     atomic.Bool   // the channel is heard
	turned chan struct{} // up has changed; capacity 1
}

// silence drops what go-redis would write to standard error: this package says when Redis comes and goes.
type silence struct{}

// Printf implements the logger of go-redis.
func (silence) Printf(context.Context, string, ...any) {}

var silenced sync.Once

// CheckURL says what is wrong with the URL of a Redis, without its password.
func CheckURL(url string) error {
	_, err := redis.ParseURL(url)
	if err != nil {
		return errors.New("a Redis URL is of the form redis://HOST:6379/0, rediss:// with TLS, or unix:///PATH")
	}
	return nil
}

func openRedis(url string) (*redisLink, error) {
	silenced.Do(func() { redis.SetLogger(silence{}) })
	if err := CheckURL(url); err != nil {
		return nil, err
	}
	o, err := redis.ParseURL(url)
	if err != nil {
		return nil, CheckURL(url)
	}
	o.ClientName = "platformd"
	o.DialTimeout, o.ReadTimeout, o.WriteTimeout = redisTimeout, redisTimeout, redisTimeout
	o.MaxRetries = -1 // who calls tries again, or goes on without
	o.DisableIdentity = true
	o.MaintNotificationsConfig = &maintnotifications.Config{Mode: maintnotifications.ModeDisabled}
	return &redisLink{client: redis.NewClient(o), turned: make(chan struct{}, 1)}, nil
}

func (l *redisLink) set(up bool) (was bool) {
	was = l.up.Swap(up)
	if was != up {
		select {
		case l.turned <- struct{}{}:
		default: // one signal waits already
		}
	}
	return was
}

// takeLease keeps a lease that is the caller's, or takes one that nobody has.
var takeLease = redis.NewScript(`
if redis.call('get', KEYS[1]) == ARGV[1] then return redis.call('pexpire', KEYS[1], ARGV[2]) end
if redis.call('set', KEYS[1], ARGV[1], 'NX', 'PX', ARGV[2]) then return 1 end
return 0`)

// dropLease gives back a lease that is the caller's.
var dropLease = redis.NewScript(`if redis.call('get', KEYS[1]) == ARGV[1] then return redis.call('del', KEYS[1]) end return 0`)

func (l *redisLink) lease(ctx context.Context, name, holder string, life time.Duration) (bool, error) {
	return takeLease.Run(ctx, l.client, []string{l.prefix + "lease:" + name}, holder, life.Milliseconds()).Bool()
}

func (l *redisLink) drop(ctx context.Context, name, holder string) error {
	return dropLease.Run(ctx, l.client, []string{l.prefix + "lease:" + name}, holder).Err()
}

// receive hears the others, until ctx ends. It notices when Redis goes and comes.
func (g *Group) receive(ctx context.Context) error {
	told := false // that it is away
	for {
		err := g.hearAll(ctx)
		if ctx.Err() != nil {
			return nil
		}
		if was := g.redis.set(false); was || !told {
			told = true
			g.cfg.Log.Warn("Redis is away: replicas go on by the database, more slowly; it is tried again", "error", err)
		}
		select {
		case <-ctx.Done():
			return nil
		case <-time.After(redisAgain):
		}
	}
}

// hearAll subscribes and hears until something fails.
func (g *Group) hearAll(ctx context.Context) error {
	// The subscription comes first, and then what others left: nothing falls between.
	sub := g.redis.client.Subscribe(ctx, g.redis.prefix+"events")
	defer sub.Close()
	// Reading does not heed ctx: closing ends it.
	defer context.AfterFunc(ctx, func() { _ = sub.Close() })()
	if _, err := sub.ReceiveTimeout(ctx, redisTimeout); err != nil {
		return err
	}
	if err := g.readBeats(ctx); err != nil {
		return err
	}
	g.redis.set(true)
	g.cfg.Log.Info("replicas talk through Redis", "replica", g.id)
	asked := false
	for ctx.Err() == nil {
		m, err := sub.ReceiveTimeout(ctx, quiet)
		var slow interface{ Timeout() bool }
		switch {
		case errors.As(err, &slow) && slow.Timeout() && !asked:
			asked = true
			if err := sub.Ping(ctx); err != nil {
				return err
			}
			continue
		case err != nil:
			return err
		}
		asked = false
		if m, ok := m.(*redis.Message); ok {
			g.open(m.Payload)
		}
	}
	return ctx.Err()
}

// open reads a message. One that does not open is of nobody who belongs here.
func (g *Group) open(sealed string) {
	b, err := g.cfg.Seal.Open(sealLabel, []byte(sealed))
	if err != nil {
		g.dropped.Inc()
		return
	}
	var m message
	if json.Unmarshal(b, &m) != nil || m.From == g.id {
		return
	}
	for _, e := range m.Events {
		g.hear(e)
	}
}

// readBeats reads the newest heartbeats that all left.
func (g *Group) readBeats(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, 10*redisTimeout)
	defer cancel()
	all, err := g.redis.client.HGetAll(ctx, g.redis.prefix+"beats").Result()
	if err != nil {
		return err
	}
	var old []string
	for node, sealed := range all {
		var e event
		b, err := g.cfg.Seal.Open(sealLabel+" "+node, []byte(sealed))
		if err == nil {
			err = json.Unmarshal(b, &e)
		}
		if err != nil || g.cfg.Now().Sub(time.UnixMicro(e.At)) > purgeAfter {
			old = append(old, node)
			continue
		}
		g.hear(e)
	}
	if len(old) > 0 {
		return g.redis.client.HDel(ctx, g.redis.prefix+"beats", old...).Err()
	}
	return nil
}

// send tells the others what waits, until ctx ends. What can not be sent is dropped: the database tells it.
func (g *Group) send(ctx context.Context) error {
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-g.wake:
		}
		events, beats := g.take()
		for len(events)+len(beats) > 0 {
			n := min(messageMax, len(events))
			k := min(messageMax-n, len(beats))
			if err := g.publish(ctx, events[:n], beats[:k]); err != nil {
				g.dropped.Add(float64(len(events)))
				break // the receiver notices on its own connection
			}
			events, beats = events[n:], beats[k:]
		}
	}
}

func (g *Group) publish(ctx context.Context, events, beats []event) error {
	ctx, cancel := context.WithTimeout(ctx, redisTimeout)
	defer cancel()
	b, err := json.Marshal(message{From: g.id, Events: append(events[:len(events):len(events)], beats...)})
	if err != nil {
		return fmt.Errorf("encode events: %w", err)
	}
	_, err = g.redis.client.Pipelined(ctx, func(p redis.Pipeliner) error {
		var left []any
		for _, e := range beats {
			b, err := json.Marshal(e)
			if err != nil {
				return err
			}
			left = append(left, e.Name, g.cfg.Seal.Seal(sealLabel+" "+e.Name, b))
		}
		if len(left) > 0 {
			p.HSet(ctx, g.redis.prefix+"beats", left...)
			p.Expire(ctx, g.redis.prefix+"beats", purgeAfter)
		}
		p.Publish(ctx, g.redis.prefix+"events", g.cfg.Seal.Seal(sealLabel, b))
		return nil
	})
	return err
}
