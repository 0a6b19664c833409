defmodule Bridge.Telemetry.Waterfall do
  @moduledoc """
  What happened in one trace, of all it goes through: host, kernel, callback, tool, model. Shows itself as a waterfall.

  `spans` are in the order in which they began, each beneath its parent, `depth` steps in; times in nanoseconds from the
  beginning of the trace.
  """

  import Bridge.Live.Words

  alias Bridge.Telemetry.Event

  @width 40
  @max_spans 200
  @max_depth 32

  @enforce_keys [:trace_id, :spans]
  defstruct [:trace_id, :spans, left_out: 0]

  @type span :: %{
          id: String.t(),
          label: String.t(),
          depth: non_neg_integer(),
          began: non_neg_integer(),
          duration: non_neg_integer() | nil,
          error: String.t() | nil
        }
  @type t :: %__MODULE__{trace_id: String.t(), spans: [span()], left_out: non_neg_integer()}

  @doc "Of these events, those of the trace that has this id or the command of this id; without one, of the last command."
  @spec of([Event.t()], String.t() | nil) :: {:ok, t()} | :error
  def of(events, id) do
    wanted =
      events
      |> Enum.reverse()
      |> Enum.find_value(fn %{name: name, metadata: said} ->
        if (id == nil and match?([:bridge, :command | _], name)) or
             (id != nil and id in [said[:trace_id], said[:command_id]]),
           do: said[:trace_id]
      end)

    if wanted, do: {:ok, build(wanted, Enum.filter(events, &(&1.metadata[:trace_id] == wanted)))}, else: :error
  end

  defp build(trace_id, events) do
    spans =
      for {id, events} <- Enum.group_by(events, & &1.metadata[:span_id]),
          id != nil,
          span = span(id, events),
          into: %{},
          do: {id, span}

    beneath = spans |> Map.values() |> Enum.sort_by(& &1.began) |> Enum.group_by(&parent(&1, spans))
    first = spans |> Map.values() |> Enum.map(& &1.began) |> Enum.min(fn -> 0 end)
    ordered = down(beneath, nil, 0)
    shown = for span <- Enum.take(ordered, @max_spans), do: %{Map.delete(span, :parent) | began: span.began - first}
    %__MODULE__{trace_id: trace_id, spans: shown, left_out: length(ordered) - length(shown)}
  end

  # One whose parent is not remembered, or is outside, begins a tree of its own.
  defp parent(span, spans), do: if(is_map_key(spans, span.parent) and span.parent != span.id, do: span.parent)

  # Bounded: a kernel, which may be anybody's, may say that two spans are each other's parents.
  defp down(_beneath, _parent, depth) when depth > @max_depth, do: []

  defp down(beneath, parent, depth) do
    Enum.flat_map(Map.get(beneath, parent, []), &[%{&1 | depth: depth} | down(beneath, &1.id, depth + 1)])
  end

  defp span(id, events) do
    begin = Enum.find(events, &(List.last(&1.name) == :start))
    ended = Enum.find(events, &(List.last(&1.name) in [:stop, :exception]))

    if begin || ended do
      event = begin || ended
      duration = ended && ns(ended.measurements[:duration])
      began = if begin, do: ns(begin.measurements[:system_time]), else: ns(ended.at) - (duration || 0)

      %{
        id: id,
        parent: event.metadata[:parent_span_id],
        label: label(event.name, event.metadata),
        depth: 0,
        began: began || ns(event.at),
        duration: duration,
        error: if(ended && List.last(ended.name) == :exception, do: ended.metadata[:error])
      }
    end
  end

  defp ns(native) when is_integer(native), do: System.convert_time_unit(native, :native, :nanosecond)
  defp ns(_other), do: nil

  defp label([:bridge, :command | _], said), do: to_string(said[:subject])
  defp label([:bridge, :execution | _], said), do: "kernel #{String.slice(to_string(said[:kernel]), 0, 4)}"
  defp label([:bridge, :callback | _], said), do: "#{said[:method]} #{said[:about]}"
  defp label([:bridge, :tool | _], said), do: "tool #{said[:tool]}"
  defp label([:bridge, :instance | _], said), do: "#{said[:action]} #{said[:class]}"
  defp label([:bridge, :span | _], said), do: to_string(said[:name])
  defp label([:bridge, :dspy, :lm | _], said), do: "LM #{said[:model]}"

  defp label([:bridge, :dspy, kind | _], said) do
    "#{kind} #{said[:module] || said[:adapter] || said[:tool] || said[:metric] || said[:optimizer]}"
  end

  defp label(name, _said), do: Enum.join(name, ".")

  @doc false
  @spec text(t()) :: String.t()
  def text(%{spans: spans} = waterfall) do
    whole = spans |> Enum.map(&(&1.began + (&1.duration || 0))) |> Enum.max(fn -> 0 end) |> max(1)
    wide = spans |> Enum.map(&(String.length(labelled(&1)) + 1)) |> Enum.max(fn -> 0 end)

    lines =
      for span <- spans do
        from = min(div(span.began * @width, whole), @width - 1)
        long = max(min(round((span.duration || 0) * @width / whole), @width - from), 1)
        bar = String.pad_trailing(String.duplicate(" ", from) <> String.duplicate("━", long), @width)
        took = if span.duration, do: duration(span.duration), else: "runs"
        failed = if span.error, do: "  ✗ " <> clip(span.error, 60), else: ""
        "#{String.pad_trailing(labelled(span), wide)} #{bar} #{took}#{failed}"
      end

    more = if waterfall.left_out > 0, do: ["… and #{quantity(waterfall.left_out, "more span")}"], else: []

    Enum.join(
      ["trace #{waterfall.trace_id} · #{quantity(length(spans), "span")} · #{duration(whole)}" | lines] ++ more,
      "\n"
    )
  end

  defp labelled(span), do: String.duplicate("  ", span.depth) <> clip(span.label, 48)

  defimpl Inspect do
    def inspect(waterfall, _opts),
      do: "#Bridge.Telemetry.Waterfall<" <> Bridge.Telemetry.Waterfall.text(waterfall) <> ">"
  end
end
