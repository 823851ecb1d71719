//go:build !linux

package udpio

func (c *Conn) steer([]ByteRange, int) error { return errSteer }

func (c *Conn) buffers() (read, write int) { return 0, 0 }

// Gauge reads the state of a socket's receive queue; here the system does not say.
type Gauge struct{}

// NewGauge makes a gauge of c's receive queue.
func (c *Conn) NewGauge() *Gauge { return &Gauge{} }

// Queue returns the zero state.
func (g *Gauge) Queue() QueueState { return QueueState{} }
