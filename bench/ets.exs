# Times reads of an ETS table for bench/store_peers.py: a line "float 1000" in, the nanoseconds that 1000 reads took out.
defmodule Bench.Ets do
  def serve(table) do
    case IO.gets("") do
      :eof ->
        :ok

      line ->
        [name, count] = String.split(line)
        key = {"session", name}
        count = String.to_integer(count)
        began = System.monotonic_time(:nanosecond)
        read(table, key, count)
        IO.puts(System.monotonic_time(:nanosecond) - began)
        serve(table)
    end
  end

  defp read(_table, _key, 0), do: :ok

  defp read(table, key, left) do
    [{^key, _value}] = :ets.lookup(table, key)
    read(table, key, left - 1)
  end
end

table = :ets.new(:variables, [:set, :public, read_concurrency: true])
:ets.insert(table, {{"session", "float"}, 0.25})
:ets.insert(table, {{"session", "dict"}, %{"x" => 1, "name" => "abc", "list" => [1, 2, 3]}})
IO.puts("up")
Bench.Ets.serve(table)
