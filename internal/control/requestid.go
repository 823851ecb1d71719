package control

// RequestIDHeader names a request: whoever asks may choose the id, and the answer has it.
const RequestIDHeader = "X-Request-Id"

// maxRequestID is how long an id of a caller's may be, in bytes: it goes into logs and the audit.
const maxRequestID = 64

// ValidRequestID says whether an id of somebody else's is taken: 8 to 64 letters, digits, dots, dashes and underscores.
func ValidRequestID(id string) bool {
	if len(id) < 8 || len(id) > maxRequestID {
		return false
	}
	for _, c := range []byte(id) {
		switch {
		case c >= 'a' && c <= 'z', c >= 'A' && c <= 'Z', c >= '0' && c <= '9', c == '.', c == '-', c == '_':
		default:
			return false
		}
	}
	return true
}
