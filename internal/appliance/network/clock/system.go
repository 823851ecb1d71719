package clock

import (
	"time"

	"golang.org/x/sys/unix"
)

// System is the machine's clock. Setting it needs CAP_SYS_TIME.
type System struct{}

// Now returns the time without the monotonic reading, which a step would not move.
func (System) Now() time.Time { return time.Now().Round(0) }

// Step sets the clock.
func (System) Step(offset time.Duration) error {
	ts := unix.NsecToTimespec(time.Now().Add(offset).UnixNano())
	if err := unix.ClockSettime(unix.CLOCK_REALTIME, &ts); err != nil {
		return err
	}
	return synchronized()
}

// Slew uses adjtime(3)'s way: the kernel runs the clock 500 ppm faster or slower until it is made up for.
func (System) Slew(offset time.Duration) error {
	const single = 0x8001 // ADJ_OFFSET_SINGLESHOT; the offset is in microseconds
	if _, err := unix.Adjtimex(&unix.Timex{Modes: single, Offset: offset.Microseconds()}); err != nil {
		return err
	}
	return synchronized()
}

// synchronized tells the kernel that the clock is right, so that it copies it to the hardware's every 11 minutes.
func synchronized() error {
	_, err := unix.Adjtimex(&unix.Timex{Modes: unix.ADJ_STATUS | unix.ADJ_MAXERROR | unix.ADJ_ESTERROR, Maxerror: 1000, Esterror: 1000})
	return err
}
