package control

// Problem is an error of the platform's API (RFC 9457, application/problem+json). Detail says what and why, Remedy what to do.
type Problem struct {
	Type   string `json:"type,omitempty"`
	Title  string `json:"title,omitempty"`
	Status int    `json:"status,omitempty"`
	Detail string `json:"detail,omitempty"`
	// Code is one of the Code constants, or empty where the status says enough.
	Code   string `json:"code,omitempty"`
	Remedy string `json:"remedy,omitempty"`
	// Errors are the parts of the request that were refused.
	Errors []ProblemPart `json:"errors,omitempty"`
	// RequestID is the id of the request that failed, by which the platform's log knows it.
	RequestID string `json:"request_id,omitempty"`
}

// ProblemPart is one refused part of a request.
type ProblemPart struct {
	Message  string `json:"message"`
	Location string `json:"location,omitempty"` // such as body.address
}

// Codes that callers branch on.
const (
	CodeTokenUsed     = "token_used"     // enrolment token: spent before
	CodeTokenExpired  = "token_expired"  // enrolment token or API token: too old
	CodeTokenUnknown  = "token_unknown"  // enrolment token or API token: never issued, or replaced by a newer one
	CodeNodeDisabled  = "node_disabled"  // until it is enabled again
	CodeNodeRevoked   = "node_revoked"   // its key is denied; a new token gives it a new one
	CodeNodeUnknown   = "node_unknown"   // deleted, or of another platform
	CodeBadAssertion  = "bad_assertion"  // signature, audience or time of a node's assertion
	CodeNotFound      = "not_found"      // no such object in the organization
	CodeConflict      = "conflict"       // the name is taken, or something still uses the object
	CodeInvalid       = "invalid"        // the request does not make sense; Errors say where
	CodeForbidden     = "forbidden"      // the API token's scope does not cover this
	CodeRateLimited   = "rate_limited"   // try again later
	CodeNotEnrolled   = "not_enrolled"   // the node has never enrolled
	CodeWrongAudience = "wrong_audience" // the token or assertion is for another platform or kind of node
)
