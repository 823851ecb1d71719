package telemetry

import (
	"context"
	"net/http"

	"go.opentelemetry.io/otel/attribute"
	"go.opentelemetry.io/otel/codes"
	"go.opentelemetry.io/otel/propagation"
	"go.opentelemetry.io/otel/trace"
)

// Kind says which side of a request a span is.
type Kind = trace.SpanKind

// The kinds.
const (
	Internal Kind = trace.SpanKindInternal // within the program
	Server   Kind = trace.SpanKindServer   // a request that came in
	Client   Kind = trace.SpanKindClient   // one that goes out
)

// Tracer begins spans. Nil begins none, at no cost.
type Tracer struct{ t trace.Tracer }

// Start begins a span below the one in ctx, which Extract may have put there, or else a trace of its own. The context it returns holds the
// span; End must be called.
func (t *Tracer) Start(ctx context.Context, name string, kind Kind) (context.Context, Span) {
	if t == nil {
		return ctx, Span{}
	}
	ctx, s := t.t.Start(ctx, name, trace.WithSpanKind(kind))
	return ctx, Span{s}
}

// Child begins a span below a recorded one of this program in ctx. Without one it begins none: what is below it is of no interest then.
func Child(ctx context.Context, name string) (context.Context, Span) {
	above := trace.SpanFromContext(ctx)
	if !above.IsRecording() {
		return ctx, Span{}
	}
	ctx, s := above.TracerProvider().Tracer(scope).Start(ctx, name)
	return ctx, Span{s}
}

// Span is a piece of work with a beginning and an end. The zero value records nothing. Its methods may be called concurrently.
type Span struct{ s trace.Span }

// Current is the span in ctx.
func Current(ctx context.Context) Span {
	s := trace.SpanFromContext(ctx)
	if !s.IsRecording() {
		return Span{}
	}
	return Span{s}
}

// Recording says whether anybody will see what is set: what is costly to say is said only then.
func (s Span) Recording() bool { return s.s != nil && s.s.IsRecording() }

// String sets an attribute. Secrets never become one.
func (s Span) String(key, value string) {
	if s.Recording() {
		s.s.SetAttributes(attribute.String(key, value))
	}
}

// Int sets an attribute.
func (s Span) Int(key string, value int) {
	if s.Recording() {
		s.s.SetAttributes(attribute.Int(key, value))
	}
}

// Rename gives the span another name, which is known only later, such as a request's route.
func (s Span) Rename(name string) {
	if s.Recording() {
		s.s.SetName(name)
	}
}

// Fail says that the work failed, and why. An empty reason says nothing.
func (s Span) Fail(why string) {
	if s.Recording() && why != "" {
		s.s.SetStatus(codes.Error, why)
	}
}

// End ends the span; what is set later is lost. It is idempotent.
func (s Span) End() {
	if s.s != nil {
		s.s.End()
	}
}

// TraceID is the trace's id in hexadecimal, "" where there is none. It is for logs.
func (s Span) TraceID() string {
	if s.s == nil || !s.s.SpanContext().IsValid() {
		return ""
	}
	return s.s.SpanContext().TraceID().String()
}

// traceparent is the header's name in a parsed request.
const traceparent = "Traceparent"

var propagator propagation.TraceContext

// Inject writes the span of ctx, if there is one, into the headers of a request that goes out.
func Inject(ctx context.Context, h http.Header) {
	if !trace.SpanContextFromContext(ctx).IsValid() {
		return
	}
	propagator.Inject(ctx, propagation.HeaderCarrier(h))
}

// Extract returns ctx with the span that a request's headers name, if they name one. Damaged headers name none.
func Extract(ctx context.Context, h http.Header) context.Context {
	if len(h[traceparent]) != 1 {
		return ctx
	}
	return propagator.Extract(ctx, propagation.HeaderCarrier(h))
}

// WithParent is Extract for a value of traceparent that came another way, such as in the environment.
func WithParent(ctx context.Context, value string) context.Context {
	return Extract(ctx, http.Header{traceparent: {value}})
}
