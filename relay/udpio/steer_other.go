//go:build !linux

package udpio

import "errors"

var errSteer = errors.New("this system does not choose by what a datagram says")

func (c *Conn) steer(*Steering, []Pin) error { return errSteer }

func (c *Conn) buffers() (read, write int) { return 0, 0 }

// Gauge reads the state of a socket's receive queue; here the system does not say.
type Gauge struct{}

// NewGauge makes a gauge of c's receive queue.
func (c *Conn) NewGauge() *Gauge { return &Gauge{} }

// Queue returns the zero state.
func (g *Gauge) Queue() QueueState { return QueueState{} }
