defmodule Bridge.TestLivebook do
  @moduledoc """
  Runs a Livebook, or another page of Markdown, as Livebook does: its Elixir cells in order, in one process of a fresh BEAM.

  Understood of Livebook's format: cells (fences that say `elixir`), `force_markdown` (a fence that is no cell) and stored
  outputs. A cell that has stored outputs must have those again; `…` stands for what differs from run to run. The first
  line `# raises: Some.Error` says that a cell must raise that. What Livebook has and these pages do not (smart cells,
  branches, attachments) is refused, so that nothing is silently not run. On other pages, `<!-- not run: reason -->`
  opts a fence out.
  """

  defmodule Cell do
    @moduledoc false
    @enforce_keys [:line, :source]
    defstruct [:line, :source, :raises, outputs: []]

    @type t :: %__MODULE__{
            line: pos_integer(),
            source: String.t(),
            raises: String.t() | nil,
            outputs: [String.t()]
          }
  end

  # A child that hangs ends itself after this, and its kernels with it; ExUnit's own limit would leave it behind.
  @limit_ms 240_000

  @doc "The cells of a page. Raises `ArgumentError` for what it does not understand."
  @spec parse(String.t()) :: [Cell.t()]
  def parse(text) do
    text |> String.split("\n") |> Enum.with_index(1) |> blocks([], nil) |> cells([])
  end

  @doc """
  Runs the cells; `:ok`, or what the first cell that failed did. `cd:` is where the BEAM starts, `install:` a directory that
  `Mix.install` keeps what it compiled in.
  """
  @spec run(Path.t(), keyword()) :: :ok | {:error, String.t()}
  def run(path, opts) do
    cells = path |> File.read!() |> parse()
    if cells == [], do: raise(ArgumentError, "#{path} has no cell")
    scratch = Path.join(System.tmp_dir!(), "bridge-livebook-#{System.pid()}-#{System.unique_integer([:positive])}")
    File.mkdir_p!(scratch)

    try do
      evaluate(path, cells, scratch, opts)
    after
      File.rm_rf!(scratch)
    end
  end

  defp evaluate(path, cells, scratch, opts) do
    [plan, report] = Enum.map(["cells", "report"], &Path.join(scratch, &1))
    File.write!(plan, :erlang.term_to_binary({Path.expand(path), Enum.map(cells, &{&1.line, &1.source}), @limit_ms}))
    File.write!(report, :erlang.term_to_binary([]))

    env = [
      # What this run of mix has set is not what a page has; and no archive, so that whoever asks for Hex is found out.
      {"MIX_ENV", nil},
      {"MIX_TARGET", nil},
      {"MIX_BUILD_PATH", nil},
      {"MIX_HOME", Path.join(scratch, "mix")},
      {"MIX_INSTALL_DIR", opts[:install] || Path.join(scratch, "install")},
      {"HEX_OFFLINE", "1"},
      {"ELIXIR_ERL_OPTIONS", "+fnu"},
      {"BRIDGE_PYTHON", Bridge.TestKernels.python()}
    ]

    script = Path.join(__DIR__, "evaluate.exs")

    {said, status} =
      System.cmd("elixir", [script, plan, report],
        cd: opts[:cd] || Path.dirname(path),
        env: env,
        stderr_to_stdout: true
      )

    done = report |> File.read!() |> :erlang.binary_to_term()
    judge(path, cells, done, said, status)
  end

  defp judge(path, cells, done, said, status) do
    failed =
      cells
      |> Enum.zip(done)
      |> Enum.find_value(fn {cell, outcome} ->
        case compare(cell, outcome) do
          :ok -> nil
          {:error, why} -> "#{path}:#{cell.line}: #{why}\n\n#{cell.source}"
        end
      end)

    cond do
      failed ->
        {:error, failed <> "\n\nThe BEAM said:\n" <> said}

      length(done) < length(cells) or status != 0 ->
        {:error, "#{path}: the BEAM ended with #{status} after #{length(done)} of #{length(cells)} cells:\n#{said}"}

      said =~ ~r/^\s*warning:/m ->
        {:error, "#{path}: a cell is warned of:\n#{said}"}

      true ->
        :ok
    end
  end

  defp compare(%Cell{raises: nil}, {:raised, _kind, text}), do: {:error, text}

  defp compare(%Cell{raises: expected}, {:raised, kind, text}) do
    if kind == expected, do: :ok, else: {:error, "it was to raise #{expected}, but:\n#{text}"}
  end

  defp compare(%Cell{raises: expected}, {:ended, _printed, _result}) when expected != nil do
    {:error, "it was to raise #{expected}, but did not"}
  end

  defp compare(%Cell{outputs: []}, {:ended, _printed, _result}), do: :ok

  defp compare(%Cell{outputs: outputs}, {:ended, printed, result}) do
    # Livebook stores what was printed and the value each in a fence of its own; a page may leave out either.
    actual = [printed, result, String.trim_trailing(printed, "\n") <> "\n" <> result]
    joined = Enum.join(outputs, "\n")

    if Enum.any?(actual, &alike?(joined, &1)) do
      :ok
    else
      {:error, "its output was to be:\n#{joined}\nbut it printed:\n#{printed}\nand its value is:\n#{result}"}
    end
  end

  defp alike?(expected, actual) do
    pattern = expected |> String.trim() |> String.split("…") |> Enum.map_join(".*?", &Regex.escape/1)
    Regex.match?(Regex.compile!("\\A" <> pattern <> "\\z", "su"), String.trim(actual))
  end

  # -- Markdown ---------------------------------------------------------------

  # The page as [{:fence, line, language, text} | {:comment, line, text}], in order; other Markdown is left out.
  defp blocks([], found, nil), do: Enum.reverse(found)
  defp blocks([], _found, {line, _, _, _}), do: raise(ArgumentError, "the fence of line #{line} is not closed")

  defp blocks([{text, line} | rest], found, nil) do
    case Regex.run(~r/\A(`{3,})\s*(\w*)\s*\z/, text) do
      [_, ticks, language] ->
        blocks(rest, found, {line, ticks, language, []})

      nil ->
        case Regex.run(~r/\A<!-- (.*) -->\s*\z/, text) do
          [_, comment] -> blocks(rest, [{:comment, line, comment} | found], nil)
          nil -> blocks(rest, text(text, found), nil)
        end
    end
  end

  defp blocks([{text, _line} | rest], found, {line, ticks, language, inside}) do
    if String.trim_trailing(text) == ticks do
      blocks(rest, [{:fence, line, language, inside |> Enum.reverse() |> Enum.join("\n")} | found], nil)
    else
      blocks(rest, found, {line, ticks, language, [text | inside]})
    end
  end

  # Prose between a comment and a fence: the comment is not about that fence.
  defp text(text, found), do: if(String.trim(text) == "", do: found, else: [:text | found])

  defp cells([], found), do: Enum.reverse(found)

  defp cells([{:comment, line, "livebook:" <> about} | rest], found) do
    case {about, rest, found} do
      {~s({"output":true}), [{:fence, _, "", output} | rest], [cell | found]} ->
        cells(rest, [%{cell | outputs: cell.outputs ++ [output]} | found])

      {~s({"force_markdown":true}), [{:fence, _, _, _} | rest], found} ->
        cells(rest, found)

      {~s({"persist_outputs":true}), rest, found} ->
        cells(rest, found)

      _other ->
        raise ArgumentError, "line #{line}: Livebook's #{about} is not understood here"
    end
  end

  defp cells([{:comment, line, "not run:" <> reason}, {:fence, _, _, _} | rest], found) do
    if String.trim(reason) == "", do: raise(ArgumentError, "line #{line}: write <!-- not run: the reason -->")
    cells(rest, found)
  end

  defp cells([{:fence, line, "elixir", source} | rest], found) do
    raises =
      case Regex.run(~r/\A# raises: ([\w.]+)/, source) do
        [_, name] -> name
        nil -> nil
      end

    cells(rest, [%Cell{line: line + 1, source: source, raises: raises} | found])
  end

  defp cells([_other | rest], found), do: cells(rest, found)
end
