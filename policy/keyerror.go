package policy

import "fmt"

// KeyError is what is wrong with the value of one key of a Config.
type KeyError struct {
	// Key is the way to it: "grants[3].executable". Of a list that may be written as
	// one value, an element has its place behind: "grants[3].executable[1]".
	Key string
	// Other is another key that has part in it, or "".
	Other string
	Err   error
}

func (e *KeyError) Error() string {
	if e.Other != "" {
		return fmt.Sprintf("%s: %v (%s)", e.Key, e.Err, e.Other)
	}
	return fmt.Sprintf("%s: %v", e.Key, e.Err)
}

func (e *KeyError) Unwrap() error { return e.Err }

// complaints collects KeyErrors below one key.
type complaints struct {
	key  string
	errs []error
}

// say complains about a key below.
func (c *complaints) say(key, format string, args ...any) {
	if c.key != "" && key != "" {
		key = "." + key
	}
	c.errs = append(c.errs, &KeyError{Key: c.key + key, Err: fmt.Errorf(format, args...)})
}
