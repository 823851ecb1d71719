// Package trial is what `sallyway bench` and a gateway say to each other: load on the path between them, by services that the gateway
// answers itself, inside of an ordinary session, as flows to a host that exists nowhere (RFC 6761 §6.4).
//
//	CONNECT bench.sallyway.invalid:1    the run: a line of JSON each way, Request and Answer, as long as the run lasts
//	CONNECT bench.sallyway.invalid:7    echo (RFC 862)
//	CONNECT bench.sallyway.invalid:9    discard (RFC 863); after the end of what is sent a line of JSON comes back: Received
//	CONNECT bench.sallyway.invalid:19   source of zeros (after RFC 864), until the reader resets it
//	CONNECT-UDP bench.sallyway.invalid 7   echo of datagrams
//
// The run comes first and the other flows of the same session belong to it: they end with it, and without one they are refused.
package trial

import (
	"bufio"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"strings"
	"time"
)

// Host is the name that stands for the gateway's own services. It never resolves.
const Host = "bench.sallyway.invalid"

// The services, by port of Host.
const (
	PortRun     = 1
	PortEcho    = 7
	PortDiscard = 9
	PortSource  = 19
)

// Limits of a run, which gateways enforce and clients keep to.
const (
	// MaxRun is how long a run may last: two directions of MaxTime, and what is measured besides.
	MaxRun = 170 * time.Second
	// MaxTime bounds the load in one direction.
	MaxTime = 60 * time.Second
	// MaxFlows is how many flows of load a client opens in one direction.
	MaxFlows = 32
	// MaxConns is how many flows a run may have open: those of load twice, since one direction's may still be ending when the other's begin,
	// and a few to measure with.
	MaxConns = 2*MaxFlows + 4
	// MaxConnects is how often a run may ask for the time to a resource.
	MaxConnects = 8
	// MaxDatagrams bounds echoed datagrams that wait to be sent; what comes when it is full is dropped.
	MaxDatagrams = 256
)

// IsHost reports whether name is Host. Case and a final dot do not count.
func IsHost(name string) bool { return strings.EqualFold(strings.TrimSuffix(name, "."), Host) }

// Op is what a Request asks for.
type Op string

// The operations.
const (
	// OpStats asks for Stats.
	OpStats Op = "stats"
	// OpConnect asks for the time that a TCP connection from the gateway to Host:Port takes. Policies decide as about any flow there;
	// the connection is closed at once and nothing is sent on it.
	OpConnect Op = "connect"
)

// Request is a line of the client's on the run.
type Request struct {
	Op   Op     `json:"op"`
	Host string `json:"host,omitempty"`
	Port uint16 `json:"port,omitempty"`
}

// Answer is the gateway's line for each Request.
type Answer struct {
	// Error says why there is nothing else in the answer.
	Error   string   `json:"error,omitempty"`
	Stats   *Stats   `json:"stats,omitempty"`
	Connect *Connect `json:"connect,omitempty"`
}

// Connect is how long a TCP handshake took.
type Connect struct {
	Took time.Duration `json:"took_ns"`
	// Refused says that the answer was RST: a round trip all the same, to a port where nobody listens.
	Refused bool `json:"refused,omitempty"`
}

// Stats is what the gateway counted so far.
type Stats struct {
	// Received and Sent are bytes of this run's discard and source flows.
	Received uint64 `json:"received_bytes"`
	Sent     uint64 `json:"sent_bytes"`
	// Datagrams is how many datagrams of this run came to the echo, those included that could not be sent back.
	Datagrams uint64 `json:"datagrams"`
	// RelayRTT is the gateway's own round trip to the relay of the session's path; 0 is not known.
	RelayRTT time.Duration `json:"relay_rtt_ns,omitempty"`
	// Sender is the gateway's QUIC sender of the session.
	Sender Sender `json:"sender"`
	// CPU is what the gateway's process and host have used since the run began.
	CPU CPU `json:"cpu"`
}

// Sender is the sending half of an end of a QUIC connection.
type Sender struct {
	// Packets were sent, Lost of them are taken for lost; both count from the session's beginning, and Lost may fall when a packet arrives
	// after all.
	Packets uint64 `json:"packets"`
	Lost    uint64 `json:"lost"`
	// Bytes of packets sent.
	Bytes uint64 `json:"bytes"`
	// Window is the congestion window in bytes now, RTT the smoothed round-trip time, MinRTT the smallest.
	Window uint64        `json:"window_bytes"`
	RTT    time.Duration `json:"rtt_ns"`
	MinRTT time.Duration `json:"min_rtt_ns"`
}

// Received is what a discard flow ends with.
type Received struct {
	Bytes uint64 `json:"bytes"`
	// Took is from the first byte to the last one.
	Took time.Duration `json:"took_ns"`
}

// maxLine bounds a line of JSON, in bytes.
const maxLine = 4 << 10

// Lines reads and writes lines of JSON. It may be used by one reader and one writer.
type Lines struct {
	s *bufio.Scanner
	w io.Writer
}

// NewLines reads lines from r and writes them to w.
func NewLines(r io.Reader, w io.Writer) *Lines {
	s := bufio.NewScanner(r)
	s.Buffer(make([]byte, 0, 512), maxLine)
	return &Lines{s, w}
}

// Read reads the next line into v. The error is io.EOF at the end.
func (l *Lines) Read(v any) error {
	if !l.s.Scan() {
		switch err := l.s.Err(); {
		case errors.Is(err, bufio.ErrTooLong):
			return fmt.Errorf("a line of more than %d bytes", maxLine)
		case err != nil:
			return err
		}
		return io.EOF
	}
	if err := json.Unmarshal(l.s.Bytes(), v); err != nil {
		return fmt.Errorf("a line that is not as expected: %w", err)
	}
	return nil
}

// Write writes v as a line.
func (l *Lines) Write(v any) error {
	b, err := json.Marshal(v)
	if err != nil {
		return fmt.Errorf("encode a line: %w", err)
	}
	_, err = l.w.Write(append(b, '\n'))
	return err
}
