package reverse

import (
	"net"
	"sync"
)

// Queue is frames that wait to be written: bounded, in order, and numbered in the chunks in which they are taken. Its methods may be called
// concurrently.
type Queue struct {
	limit int

	mu     sync.Mutex // guards what follows
	some   sync.Cond  // there is something, or it is closed
	room   sync.Cond  // there is room again, or it is closed
	b      []byte     // frames; those before head are taken
	head   int
	number uint32 // of the next chunk
	closed bool
}

// DefaultQueue bounds a queue, in bytes: 20 ms of 100 Mbit/s.
const DefaultQueue = 256 << 10

// NewQueue makes a queue of limit bytes.
func NewQueue(limit int) *Queue {
	q := &Queue{limit: limit}
	q.some.L, q.room.L = &q.mu, &q.mu
	return q
}

func (q *Queue) fitsLocked(n int) bool { return len(q.b)-q.head+n <= q.limit }

// makeRoomLocked moves what waits to the front when the end of the buffer is near.
func (q *Queue) makeRoomLocked(n int) {
	if q.head > 0 && len(q.b)+n > cap(q.b) {
		q.b = q.b[:copy(q.b, q.b[q.head:])]
		q.head = 0
	}
}

// Put appends payload as frames of segment bytes each (segment > 0) without waiting, and returns how many bytes of it found room.
func (q *Queue) Put(payload []byte, segment int) (sent int, err error) {
	q.mu.Lock()
	defer q.mu.Unlock()
	if q.closed {
		return 0, net.ErrClosed
	}
	for sent < len(payload) {
		n := min(segment, len(payload)-sent)
		if !q.fitsLocked(frameHeader + n) {
			break
		}
		q.makeRoomLocked(frameHeader + n)
		q.b = appendFrames(q.b, payload[sent:sent+n], n)
		sent += n
	}
	if sent > 0 {
		q.some.Signal()
	}
	return sent, nil
}

// PutFrames appends whole frames and waits for room. It reports false when the queue is closed.
func (q *Queue) PutFrames(frames []byte) bool {
	q.mu.Lock()
	defer q.mu.Unlock()
	for !q.closed && !q.fitsLocked(len(frames)) && len(q.b) > q.head {
		q.room.Wait()
	}
	if q.closed {
		return false
	}
	q.makeRoomLocked(len(frames))
	q.b = append(q.b, frames...)
	q.some.Signal()
	return true
}

// PutControl appends a control frame, full or not: there are only a few.
func (q *Queue) PutControl(k Control) {
	q.mu.Lock()
	defer q.mu.Unlock()
	if q.closed {
		return
	}
	q.b = append(q.b, 0, 0, byte(k))
	q.some.Signal()
}

// Take copies whole frames, as many as there are and fit, to buf, which holds MaxChunk bytes, and returns their length and the chunk's
// number. It waits for frames, and reports false when the queue is closed.
func (q *Queue) Take(buf []byte) (n int, number uint32, ok bool) {
	q.mu.Lock()
	defer q.mu.Unlock()
	for !q.closed && len(q.b) == q.head {
		q.some.Wait()
	}
	if q.closed {
		return 0, 0, false
	}
	waiting := q.b[q.head:]
	if n = len(waiting); n > len(buf) {
		n = 0
		for {
			_, size, _ := frame(waiting[n:]) // whole and good: it was put so
			if n+size > len(buf) {
				break
			}
			n += size
		}
	}
	copy(buf, waiting[:n])
	if q.head += n; q.head == len(q.b) {
		q.b, q.head = q.b[:0], 0
	} else {
		q.some.Signal() // for another writer
	}
	q.number++
	q.room.Broadcast()
	return n, q.number - 1, true
}

// Close drops what waits; it may be called more than once.
func (q *Queue) Close() {
	q.mu.Lock()
	defer q.mu.Unlock()
	q.closed = true
	q.b, q.head = nil, 0
	q.some.Broadcast()
	q.room.Broadcast()
}
