defmodule Bridge.Live.Page do
  @moduledoc false
  # The dashboard's HTML, from a summary: a picture of the last minute, then the tables. Pure.

  import Bridge.Live.Words

  alias Bridge.Display.Table
  alias Bridge.Telemetry.Summary

  @width 480
  @height 60

  @spec html(Summary.t()) :: String.t()
  def html(summary) do
    tables = for {title, columns, rows} <- Summary.tables(summary), do: Table.html(columns, Enum.take(rows, 20), title)
    body = Enum.join([headline(summary), minute(summary.recent) | tables], "\n")
    ~s(<div class="bridge-page" style="font:12px/1.5 ui-monospace,monospace">#{body}</div>)
  end

  defp headline(summary) do
    alive = Enum.count(summary.kernels, &(&1.state == :alive))
    died = Enum.count(summary.kernels, &(&1.state == :died))
    said = quantity(alive, "kernel") <> if(died > 0, do: ", #{died} died", else: "")
    "<div><b>#{said}</b> <span style=\"opacity:.75\">#{escape(Summary.headline(summary))}</span></div>"
  end

  defp minute(nil), do: ""

  defp minute(recent) do
    most = max(Enum.max(recent.commands), 1)
    wide = div(@width, length(recent.commands))

    bars =
      recent.commands
      |> Enum.zip(recent.errors)
      |> Enum.with_index()
      |> Enum.map_join(fn {{commands, errors}, at} ->
        bar(at * wide, wide - 1, commands / most, "#2979ff") <> bar(at * wide, wide - 1, errors / most, "#f0392b")
      end)

    percentiles =
      for {name, ns} <- [p50: recent.p50, p95: recent.p95, p99: recent.p99], ns, do: "#{name} #{duration(ns)}"

    label = "commands a second, the last minute: #{most} at most"

    ~s(<svg width="#{@width}" height="#{@height}" role="img" aria-label="#{label}">#{bars}</svg>) <>
      "<div style=\"opacity:.75\">#{Enum.join([label | percentiles], " · ")}</div>"
  end

  defp bar(_x, _width, share, _colour) when share == 0, do: ""

  defp bar(x, width, share, colour) do
    height = max(round(min(share, 1.0) * @height), 1)
    ~s(<rect x="#{x}" y="#{@height - height}" width="#{width}" height="#{height}" fill="#{colour}"/>)
  end
end
