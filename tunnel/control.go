package tunnel

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
)

// Notice is a message on a session's control stream: a line of JSON.
type Notice struct {
	// Type says what it is: a Notice constant, or what gateway and client agree on.
	Type string `json:"type"`
	// Reason is for people.
	Reason string `json:"reason,omitempty"`
	// Data is what the type says.
	Data json.RawMessage `json:"data,omitempty"`
}

// Types of notices that tunnel sends itself.
const (
	// NoticeDraining says that the gateway takes no new flows and will end.
	NoticeDraining = "draining"
	// noticeHello is the gateway's first: the session is accepted.
	noticeHello = "hello"
	// noticePath is the client's after a move: the gateway's QUIC follows on a packet that is no probe (RFC 9000 §9.3). Its data is a move.
	noticePath = "path"
	// noticeFollowed is the gateway's answer, with the same data. A gateway whose hello has the data helloAnswers gives it.
	noticeFollowed = "followed"
	// noticeCrowded is the client's when a standby got no answer though the active path lives: the gateway may have no connection ID left for it, since
	// former standbys hold them all.
	noticeCrowded = "crowded"
)

// move is the data of noticePath and noticeFollowed: how often the session had moved, that time included.
type move struct {
	Moves uint64 `json:"moves"`
}

func (m move) encode() json.RawMessage {
	b, _ := json.Marshal(m) // never fails
	return b
}

// helloAnswers is the data of the hello of a gateway that answers moves.
var helloAnswers = json.RawMessage(`{"answers_moves":true}`)

const (
	// maxNotice bounds a notice on the wire, in bytes.
	maxNotice = 64 << 10
	// mostMove bounds the data of a noticePath that is answered, in bytes.
	mostMove = 64
	// noticeQueue is how many notices may wait to be sent.
	noticeQueue = 64
)

// control is an end of the control stream. send may be called concurrently; run and receive have a goroutine each.
type control struct {
	str h3stream
	out chan []byte
}

func newControl(str h3stream) *control {
	return &control{str: str, out: make(chan []byte, noticeQueue)}
}

// send queues a notice.
func (c *control) send(n Notice) error {
	b, err := json.Marshal(n)
	if err != nil {
		return fmt.Errorf("encode notice: %w", err)
	}
	if len(b) >= maxNotice {
		return fmt.Errorf("notice of %d bytes, limit %d", len(b), maxNotice)
	}
	select {
	case c.out <- append(b, '\n'):
		return nil
	default:
		return errors.New("too many notices wait to be sent")
	}
}

// run writes what send queued until ctx ends, which must also end the stream's connection or reset the stream.
func (c *control) run(ctx context.Context) {
	for {
		select {
		case <-ctx.Done():
			return
		case b := <-c.out:
			if _, err := c.str.Write(b); err != nil {
				return // the stream is gone, and with it the session
			}
		}
	}
}

// noticeReader reads notices off a stream.
type noticeReader struct{ s *bufio.Scanner }

func newNoticeReader(r io.Reader) *noticeReader {
	s := bufio.NewScanner(r)
	s.Buffer(make([]byte, 0, 4<<10), maxNotice)
	return &noticeReader{s}
}

// next returns the next notice; io.EOF at the end.
func (r *noticeReader) next() (Notice, error) {
	var n Notice
	if !r.s.Scan() {
		if err := r.s.Err(); err != nil {
			if errors.Is(err, bufio.ErrTooLong) {
				return n, fmt.Errorf("notice of more than %d bytes", maxNotice)
			}
			return n, streamError(err)
		}
		return n, io.EOF
	}
	if err := json.Unmarshal(r.s.Bytes(), &n); err != nil {
		return n, fmt.Errorf("decode notice: %w", err)
	}
	return n, nil
}
