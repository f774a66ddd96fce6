package imdstest

import (
	"strconv"
	"strings"
	"time"
)

// An answer is what a request gets, before it becomes bytes.
type answer struct {
	status   int
	token    bool  // the body is a token: the hop limit applies
	ttl      int64 // of the token, s; 0 means no such header
	page     *page // nil for errors and tokens
	body     []byte
	allow    string
	old      bool // in the manner of Config.HTTP10
	json     bool // in the manner of Config.Agent
	keep     bool
	headOnly bool
}

// answer says what the service does with a request.
func (i *instance) answer(r *Request, p place, readable bool, now time.Time, serial int64) answer {
	if i.EndpointDisabled {
		return answer{status: 403}
	}
	if i.Agent != nil {
		return i.agentAnswer(r, now)
	}
	forwarded := false
	if _, ok := r.Header("X-Forwarded-For"); ok {
		forwarded = true
	}
	if readable && p.path == "api/token" && (r.Method == "PUT" || p.version == "latest" && !p.slashed) {
		return i.tokenAnswer(r, p, forwarded, now, serial)
	}
	if r.Method != "GET" && r.Method != "HEAD" {
		return answer{status: 405, allow: "GET, HEAD"} // a guess
	}
	a := answer{headOnly: r.Method == "HEAD"}
	token, ok := r.Header("X-Aws-Ec2-Metadata-Token")
	switch {
	case ok && forwarded:
		a.status = 403
		return a
	case ok:
		if a.ttl, ok = i.check(token, now); !ok {
			a.status, a.ttl = 401, 0
			return a
		}
	case i.TokensRequired:
		a.status = 401
		return a
	}
	if !readable {
		a.status = 404
		return a
	}
	if a.page = i.tree.find(p, i.Reading); a.page == nil {
		a.status = 404
		return a
	}
	a.status, a.body, a.old = 200, a.page.body, i.http10[p.path]
	return a
}

func (i *instance) tokenAnswer(r *Request, p place, forwarded bool, now time.Time, serial int64) answer {
	switch {
	case r.Method == "OPTIONS":
		return answer{status: 200, allow: "OPTIONS, PUT"} // a guess, from the Allow of 405
	case r.Method != "PUT":
		return answer{status: 405, allow: "OPTIONS, PUT", headOnly: r.Method == "HEAD"}
	case p.version != "latest" || p.slashed || forwarded:
		return answer{status: 403}
	}
	value, _ := r.Header("X-Aws-Ec2-Metadata-Token-Ttl-Seconds")
	ttl, ok := digits(value)
	if !ok || ttl < 1 || ttl > maxTTL {
		return answer{status: 400}
	}
	return answer{status: 200, token: true, ttl: ttl, body: i.mint(now, ttl, serial)}
}

// append renders the answer. Four orders of headers are known: data, errors without a page together with tokens,
// the second generation's, and that of agents; an error with a page is ordered like data.
func (i *instance) append(b []byte, a *answer, now time.Time) []byte {
	body, contentType := a.body, "text/plain"
	if a.page != nil {
		contentType = a.page.contentType
	}
	if i.Pages == XHTML && (a.status == 400 || a.status == 401 || a.status == 404) {
		body, contentType = xhtml(a.status), "text/html"
	}
	field := func(name, value string) {
		b = append(b, name...)
		b = append(b, ": "...)
		b = append(b, value...)
		b = append(b, "\r\n"...)
	}
	number := func(name string, n int64) {
		b = append(b, name...)
		b = append(b, ": "...)
		b = strconv.AppendInt(b, n, 10)
		b = append(b, "\r\n"...)
	}
	date := func(name string, t time.Time) {
		b = append(b, name...)
		b = append(b, ": "...)
		b = t.UTC().AppendFormat(b, "Mon, 02 Jan 2006 15:04:05 GMT")
		b = append(b, "\r\n"...)
	}
	const ttl = "X-Aws-Ec2-Metadata-Token-Ttl-Seconds"

	if a.old {
		b = append(b, "HTTP/1.0 "...)
	} else {
		b = append(b, "HTTP/1.1 "...)
	}
	b = strconv.AppendInt(b, int64(a.status), 10)
	b = append(b, ' ')
	b = append(b, reason(a.status)...)
	b = append(b, "\r\n"...)
	switch {
	case a.json:
		field("Content-Type", "application/json")
		date("Date", now)
		number("Content-Length", int64(len(body)))
		if !a.keep {
			field("Connection", "close")
		}
	case a.old:
		field("Accept-Ranges", "bytes")
		number("Content-Length", int64(len(body)))
		field("Content-Type", contentType)
		date("Date", now)
		date("Last-Modified", a.page.modified)
		if a.ttl > 0 {
			number(ttl, a.ttl)
		}
		field("Connection", "close")
		field("Server", "EC2ws")
	case a.page != nil || contentType == "text/html":
		if a.ttl > 0 {
			number(ttl, a.ttl)
		}
		field("Content-Type", contentType)
		if a.page != nil {
			field("Accept-Ranges", "none")
			date("Last-Modified", a.page.modified)
		}
		number("Content-Length", int64(len(body)))
		date("Date", now)
		field("Server", "EC2ws")
		if !a.keep {
			field("Connection", "close")
		}
	default:
		if a.allow != "" {
			field("Allow", a.allow)
		}
		if a.ttl > 0 {
			number(ttl, a.ttl)
		}
		number("Content-Length", int64(len(body)))
		date("Date", now)
		field("Server", "EC2ws")
		if !a.keep {
			field("Connection", "close")
		}
		field("Content-Type", contentType)
	}
	b = append(b, "\r\n"...)
	if !a.headOnly {
		b = append(b, body...)
	}
	return b
}

func reason(status int) string {
	switch status {
	case 200:
		return "OK"
	case 400:
		return "Bad Request"
	case 401:
		return "Unauthorized"
	case 403:
		return "Forbidden"
	case 404:
		return "Not Found"
	case 405:
		return "Not Allowed" // not RFC 9110's "Method Not Allowed"
	case 417:
		return "Expectation Failed"
	case 429:
		return "Too Many Requests"
	case 500:
		return "Internal Server Error"
	case 503:
		return "Service Unavailable"
	}
	return "Fault"
}

// xhtml is the service's page for a status: 343 bytes for 401.
func xhtml(status int) []byte {
	title := strconv.Itoa(status) + " - " + reason(status)
	return []byte(strings.ReplaceAll(`<?xml version="1.0" encoding="iso-8859-1"?>
<!DOCTYPE html PUBLIC "-//W3C//DTD XHTML 1.0 Transitional//EN"
	"http://www.w3.org/TR/xhtml1/DTD/xhtml1-transitional.dtd">
<html xmlns="http://www.w3.org/1999/xhtml" xml:lang="en" lang="en">
 <head>
  <title>TITLE</title>
 </head>
 <body>
  <h1>TITLE</h1>
 </body>
</html>
`, "TITLE", title))
}
