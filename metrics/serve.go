package metrics

import (
	"errors"
	"net"
	"net/http"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/promhttp"
	"golang.org/x/net/netutil"
)

// Who can connect can keep a connection, and is one of few: a scraper needs one, and a
// second while the first is ended.
const (
	maxConnections = 8
	scrapeTakes    = 10 * time.Second // Prometheus gives up after as long
	idleFor        = 30 * time.Second
)

// Server serves the counts on one listener.
type Server struct {
	http *http.Server
	done chan error
}

// Serve answers GET /metrics, and nothing else, until Close.
func Serve(ln net.Listener, from prometheus.Gatherer) *Server {
	mux := http.NewServeMux()
	mux.Handle("GET /metrics", promhttp.HandlerFor(from, promhttp.HandlerOpts{
		DisableCompression: true, MaxRequestsInFlight: 2, ErrorHandling: promhttp.ContinueOnError,
	}))
	s := &Server{done: make(chan error, 1), http: &http.Server{
		Handler: mux, ReadTimeout: scrapeTakes / 2, WriteTimeout: scrapeTakes, IdleTimeout: idleFor, MaxHeaderBytes: 16 << 10,
	}}
	go func() { s.done <- s.http.Serve(netutil.LimitListener(ln, maxConnections)) }()
	return s
}

// Close ends all answers and removes a Unix socket.
func (s *Server) Close() error {
	err := s.http.Close()
	if served := <-s.done; !errors.Is(served, http.ErrServerClosed) {
		err = errors.Join(err, served)
	}
	return err
}
