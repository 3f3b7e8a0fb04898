// Renders conversations with Go's own text/template in the way Ollama calls it, one JSON request a line.
//
// Two ways: a template that ranges over .Messages sees the whole conversation; any other is run once a turn
// with .System, .Prompt and .Response, and the last time only as far as .Response.
package main

import (
	"bufio"
	"encoding/json"
	"os"
	"strings"
	"text/template"
	"text/template/parse"
)

type message struct {
	Role    string
	Content string
}

type request struct {
	Template string    `json:"template"`
	Messages []message `json:"messages"`
}

type answer struct {
	Text  string `json:"text"`
	Error string `json:"error"`
}

func main() {
	lines := bufio.NewReaderSize(os.Stdin, 1<<20)
	out := json.NewEncoder(os.Stdout)
	for {
		line, err := lines.ReadBytes('\n')
		if err != nil {
			return
		}
		var asked request
		var told answer
		if err := json.Unmarshal(line, &asked); err != nil {
			told.Error = err.Error()
		} else if told.Text, err = render(asked); err != nil {
			told.Error = err.Error()
		}
		out.Encode(told)
	}
}

func render(asked request) (string, error) {
	parsed, err := template.New("").Option("missingkey=zero").Parse(asked.Template)
	if err != nil {
		return "", err
	}
	var system []string
	var turns []*message
	for _, next := range asked.Messages {
		next := next
		if next.Role == "system" {
			system = append(system, next.Content)
		}
		if last := len(turns) - 1; last >= 0 && turns[last].Role == next.Role && next.Role != "tool" {
			turns[last].Content += "\n\n" + next.Content
		} else {
			turns = append(turns, &next)
		}
	}
	var text strings.Builder
	if mentions(parsed.Root, "Messages") {
		err = parsed.Execute(&text, map[string]any{
			"System": strings.Join(system, "\n\n"), "Messages": turns, "Response": "",
		})
		return text.String(), err
	}
	if !mentions(parsed.Root, "Response") {
		ending, _ := template.New("").Parse("{{ .Response }}")
		parsed.Root.Nodes = append(parsed.Root.Nodes, ending.Root.Nodes...)
	}
	values := map[string]any{"System": "", "Prompt": "", "Response": ""}
	flush := func(names ...string) error {
		for _, name := range names {
			if values[name] != "" {
				err := parsed.Execute(&text, values)
				values = map[string]any{"System": "", "Prompt": "", "Response": ""}
				return err
			}
		}
		return nil
	}
	for _, turn := range turns {
		switch turn.Role {
		case "system":
			err = flush("Prompt", "Response")
			values["System"] = turn.Content
		case "user":
			err = flush("Response")
			values["Prompt"] = turn.Content
		case "assistant":
			values["Response"] = turn.Content
		}
		if err != nil {
			return "", err
		}
	}
	short := parsed.Root.CopyList()
	cutAtResponse(short)
	last, err := template.New("").AddParseTree("", &parse.Tree{Root: short})
	if err != nil {
		return "", err
	}
	err = last.Execute(&text, values)
	return text.String(), err
}

// Whether a field of this name stands anywhere.
func mentions(node parse.Node, name string) bool {
	return node != nil && strings.Contains(node.String(), "."+name)
}

// Drops the action with .Response and everything behind it; tells whether there was one.
func cutAtResponse(list *parse.ListNode) bool {
	if list == nil {
		return false
	}
	for at, node := range list.Nodes {
		switch node := node.(type) {
		case *parse.ActionNode:
			if mentions(node, "Response") {
				list.Nodes = list.Nodes[:at]
				return true
			}
		case *parse.IfNode:
			if cutAtResponse(node.List) || cutAtResponse(node.ElseList) {
				list.Nodes = list.Nodes[:at+1]
				return true
			}
		case *parse.RangeNode:
			if cutAtResponse(node.List) {
				list.Nodes = list.Nodes[:at+1]
				return true
			}
		}
	}
	return false
}
