defmodule Bridge.TestEvaluate do
  # Runs the cells of a page in one process, as Livebook's evaluator does, and reports after each: Bridge.TestLivebook.

  def main([plan, report]) do
    {file, cells, limit_ms} = plan |> File.read!() |> :erlang.binary_to_term()
    {:ok, _timer} = :timer.apply_after(limit_ms, System, :halt, [124])
    {evaluator, watched} = spawn_monitor(fn -> page(file, cells, report) end)

    receive do
      {:DOWN, ^watched, :process, ^evaluator, reason} -> ended(reason)
    end
  end

  defp ended(:normal), do: :ok
  defp ended(reason), do: IO.puts("the evaluator ended: " <> Exception.format_exit(reason))

  defp page(file, cells, report) do
    {:ok, io} = StringIO.open("")
    Process.group_leader(self(), io)

    Enum.reduce_while(cells, {[], {[], Code.env_for_eval([])}}, fn cell, {outcomes, context} ->
      {outcome, context, next} = cell(file, cell, context, io)
      outcomes = [outcome | outcomes]
      File.write!(report, outcomes |> Enum.reverse() |> :erlang.term_to_binary())
      {next, {outcomes, context}}
    end)
  end

  defp cell(file, {line, source}, {binding, env}, io) do
    quoted = Code.string_to_quoted!(source, file: file, line: line)
    {value, binding, env} = Code.eval_quoted_with_env(quoted, binding, %{env | file: file, line: line})
    {{:ended, StringIO.flush(io), inspect(value, pretty: true, width: 100)}, {binding, env}, :cont}
  catch
    kind, reason ->
      name = name(kind, reason)
      # A cell that is to raise leaves everything as it was before it; after any other nothing is run.
      next = if String.starts_with?(source, "# raises: #{name}"), do: :cont, else: :halt
      {{:raised, name, Exception.format(kind, reason, __STACKTRACE__)}, {binding, env}, next}
  end

  defp name(:error, error), do: inspect(Exception.normalize(:error, error).__struct__)
  defp name(kind, _reason), do: to_string(kind)
end

Bridge.TestEvaluate.main(System.argv())
