//go:build !noredis

package replica

import (
	"context"
	"crypto/tls"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/url"
	"strconv"
	"strings"
	"sync/atomic"
	"time"

	"github.com/gomodule/redigo/redis"
)

// Limits of what goes through Redis.
const (
	redisAgain = 500 * time.Millisecond // between tries to reach it
	quiet      = 5 * time.Second        // the connection that hears is asked whether it lives; one that says nothing for twice that does not
	idleTrust  = time.Second            // a connection that lay unused for longer is asked before it is used
	idleMost   = 4                      // unused connections that are kept
	messageMax = 1000                   // events in one message
	sealLabel  = "replica"              // under which messages are sealed
)

// redisLink is the connection to Redis.
type redisLink struct {
	client *redis.Pool
	prefix string        // of keys and channels; set before use
	up     atomic.Bool   // the channel is heard
	turned chan struct{} // up has changed; capacity 1
}

// place is where a Redis is and who asks it.
type place struct {
	network, address string
	options          []redis.DialOption
}

// CheckURL says what is wrong with the URL of a Redis, without its password.
func CheckURL(text string) error {
	_, err := parseURL(text)
	return err
}

// parseURL reads redis://[[USER]:PASSWORD@]HOST[:PORT][/DATABASE], the same with rediss for TLS, and unix://[[USER]:PASSWORD@]/PATH[?db=DATABASE].
func parseURL(text string) (*place, error) {
	bad := errors.New("a Redis URL is of the form redis://HOST:6379/0, rediss:// with TLS, or unix:///PATH")
	u, err := url.Parse(text)
	if err != nil || u.Opaque != "" || u.Fragment != "" {
		return nil, bad
	}
	query, err := url.ParseQuery(u.RawQuery)
	if err != nil {
		return nil, bad
	}
	p := &place{network: "tcp"}
	database := query.Get("db")
	query.Del("db")
	switch u.Scheme {
	case "redis", "rediss":
		if u.Hostname() == "" {
			return nil, bad
		}
		port := u.Port()
		if port == "" {
			port = "6379"
		}
		p.address = net.JoinHostPort(u.Hostname(), port)
		if in := strings.Trim(u.Path, "/"); in != "" {
			database = in
		}
		if u.Scheme == "rediss" {
			p.options = append(p.options, redis.DialUseTLS(true), redis.DialTLSConfig(&tls.Config{MinVersion: tls.VersionTLS12, ServerName: u.Hostname()}))
		}
	case "unix":
		if p.network, p.address = "unix", u.Path; u.Host != "" || u.Path == "" {
			return nil, bad
		}
	default:
		return nil, bad
	}
	n, err := strconv.Atoi("0" + database)
	if err != nil || len(query) > 0 {
		return nil, bad
	}
	password, has := u.User.Password()
	if !has {
		password = u.User.Username() // as redis-cli takes it
	} else {
		p.options = append(p.options, redis.DialUsername(u.User.Username()))
	}
	p.options = append(p.options, redis.DialDatabase(n), redis.DialPassword(password), redis.DialClientName("platformd"), redis.DialConnectTimeout(redisTimeout),
		redis.DialTLSHandshakeTimeout(redisTimeout), redis.DialReadTimeout(redisTimeout), redis.DialWriteTimeout(redisTimeout))
	return p, nil
}

func openRedis(text string) (*redisLink, error) {
	p, err := parseURL(text)
	if err != nil {
		return nil, err
	}
	return &redisLink{turned: make(chan struct{}, 1), client: &redis.Pool{
		MaxIdle: idleMost,
		DialContext: func(ctx context.Context) (redis.Conn, error) {
			return redis.DialContext(ctx, p.network, p.address, p.options...)
		},
		TestOnBorrowContext: func(ctx context.Context, c redis.Conn, last time.Time) error {
			if time.Since(last) < idleTrust {
				return nil
			}
			_, err := redis.DoContext(c, ctx, "PING")
			return err
		},
	}}, nil
}

// with does something on a connection of the pool. Who calls tries again, or goes on without.
func (l *redisLink) with(ctx context.Context, do func(redis.Conn) error) error {
	c, err := l.client.GetContext(ctx)
	if err != nil {
		return err
	}
	return errors.Join(do(c), c.Close()) // closing gives it back, or ends one that failed
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
var takeLease = redis.NewScript(1, `
if redis.call('get', KEYS[1]) == ARGV[1] then return redis.call('pexpire', KEYS[1], ARGV[2]) end
if redis.call('set', KEYS[1], ARGV[1], 'NX', 'PX', ARGV[2]) then return 1 end
return 0`)

// dropLease gives back a lease that is the caller's.
var dropLease = redis.NewScript(1, `if redis.call('get', KEYS[1]) == ARGV[1] then return redis.call('del', KEYS[1]) end return 0`)

func (l *redisLink) lease(ctx context.Context, name, holder string, life time.Duration) (mine bool, err error) {
	err = l.with(ctx, func(c redis.Conn) error {
		mine, err = redis.Bool(takeLease.DoContext(ctx, c, l.prefix+"lease:"+name, holder, life.Milliseconds()))
		return err
	})
	return mine, err
}

func (l *redisLink) drop(ctx context.Context, name, holder string) error {
	return l.with(ctx, func(c redis.Conn) error {
		_, err := dropLease.DoContext(ctx, c, l.prefix+"lease:"+name, holder)
		return err
	})
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
	c, err := g.redis.client.DialContext(ctx) // its own: what hears can do nothing else
	if err != nil {
		return err
	}
	sub := redis.PubSubConn{Conn: c}
	defer sub.Close()
	// Reading does not heed ctx: closing ends it.
	defer context.AfterFunc(ctx, func() { _ = sub.Close() })()
	// The subscription comes first, and then what others left: nothing falls between.
	if err := sub.Subscribe(g.redis.prefix + "events"); err != nil {
		return err
	}
	if err, bad := sub.ReceiveWithTimeout(redisTimeout).(error); bad {
		return err
	}
	if err := g.readBeats(ctx); err != nil {
		return err
	}
	g.redis.set(true)
	g.cfg.Log.Info("replicas talk through Redis", "replica", g.id)
	ask := time.AfterFunc(quiet, func() { _ = sub.Ping("") }) // what fails here fails below
	defer ask.Stop()
	for ctx.Err() == nil {
		switch m := sub.ReceiveWithTimeout(2 * quiet).(type) {
		case error:
			return m
		case redis.Message:
			g.open(string(m.Data))
		case redis.Pong:
			ask.Reset(quiet)
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
	var all map[string]string
	if err := g.redis.with(ctx, func(c redis.Conn) (err error) {
		all, err = redis.StringMap(redis.DoContext(c, ctx, "HGETALL", g.redis.prefix+"beats"))
		return err
	}); err != nil {
		return err
	}
	old := []any{g.redis.prefix + "beats"}
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
	if len(old) == 1 {
		return nil
	}
	return g.redis.with(ctx, func(c redis.Conn) error {
		_, err := redis.DoContext(c, ctx, "HDEL", old...)
		return err
	})
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
	left := []any{g.redis.prefix + "beats"}
	for _, e := range beats {
		b, err := json.Marshal(e)
		if err != nil {
			return fmt.Errorf("encode a heartbeat: %w", err)
		}
		left = append(left, e.Name, g.cfg.Seal.Seal(sealLabel+" "+e.Name, b))
	}
	return g.redis.with(ctx, func(c redis.Conn) error {
		if len(beats) > 0 { // they go with what follows
			if err := errors.Join(c.Send("HSET", left...), c.Send("EXPIRE", left[0], int(purgeAfter.Seconds()))); err != nil {
				return err
			}
		}
		_, err := redis.DoContext(c, ctx, "PUBLISH", g.redis.prefix+"events", g.cfg.Seal.Seal(sealLabel, b))
		return err
	})
}
