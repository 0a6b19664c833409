defmodule Bridge.Display.Table do
  @moduledoc false
  # Rows of texts under their columns, as text and as HTML: the same rows. What would break them is shown as a space.

  import Bridge.Live.Words

  @max_cell 80
  @max_rows 200

  @spec text([String.t()], [[String.t()]]) :: String.t()
  def text(columns, rows) do
    {rows, more} = cells(rows)
    widths = Enum.zip_with([columns | rows], fn column -> column |> Enum.map(&String.length/1) |> Enum.max() end)

    lines =
      for row <- [columns | rows] do
        row |> Enum.zip_with(widths, &String.pad_trailing/2) |> Enum.join("  ") |> String.trim_trailing()
      end

    Enum.join(lines ++ more, "\n")
  end

  @spec html([String.t()], [[String.t()]], String.t()) :: String.t()
  def html(columns, rows, title) do
    {rows, more} = cells(rows)
    head = Enum.map_join(columns, &"<th style=\"text-align:left;padding-right:1.5em\">#{escape(&1)}</th>")

    body =
      Enum.map_join(rows, fn row ->
        "<tr>" <> Enum.map_join(row, &"<td style=\"padding-right:1.5em\">#{escape(&1)}</td>") <> "</tr>"
      end)

    caption = "<caption style=\"text-align:left;font-weight:bold\">#{escape(title)}</caption>"
    "<table>#{caption}<thead><tr>#{head}</tr></thead><tbody>#{body}</tbody></table>#{more}"
  end

  defp cells(rows) do
    shown = for row <- Enum.take(rows, @max_rows), do: Enum.map(row, &clip(&1, @max_cell))
    left = length(rows) - length(shown)
    {shown, if(left > 0, do: ["… and #{thousands(left)} more"], else: [])}
  end
end
