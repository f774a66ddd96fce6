package main

import "testing"

// What an operator has typed is in the log of the daemon with each change of the mode.
func TestWithoutReasons(t *testing.T) {
	log := `x imdsgated[1]: {"level":"warn","mode":"off","by":"root","reason":"the \"cat\\ ate it","time":"2026"}` + "\n" + `{"message":"a reason"}`
	want := `x imdsgated[1]: {"level":"warn","mode":"off","by":"root","reason":"[left out]","time":"2026"}` + "\n" + `{"message":"a reason"}`
	if got := string(withoutReasons([]byte(log))); got != want {
		t.Errorf("%s", got)
	}
}
