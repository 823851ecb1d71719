package web

import "sallyway/internal/control"

// signOnButtons are the providers of single sign-on that the login page offers.
func (q *request) signOnButtons() ([]control.ProviderRecord, error) { return nil, nil }
