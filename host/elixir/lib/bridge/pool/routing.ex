defmodule Bridge.Pool.Routing do
  @moduledoc false
  # Which of several kernels gets a command. A value: chance is a state of `:rand`, the clock is the caller's.
  #
  # - `:fastest`: where the command is expected to be done first: how long it takes there, beside what is in flight there.
  #   Of a kernel of which nothing is known, or nothing new for long, it expects as much as of the best. Among kernels
  #   that are about as good, the one with the fewest commands in flight, and of these the longest unused: so those are
  #   tried.
  # - `:least_loaded`: the one with the fewest commands in flight; among equals the longest unused.
  # - `:random`: any of them.
  # - a function of the ask and the candidates, which returns the `id` of one. It runs in the pool's process: it must be
  #   quick. One that fails, or returns something else, is reported and counts as `:least_loaded`.

  alias Bridge.Pool.{Kinds, Load}

  # Expectations that differ by less than that factor are the same: what is measured is no more exact.
  @about 1.2

  @type candidate :: %{
          :id => term(),
          :in_flight => non_neg_integer(),
          :last_used => non_neg_integer(),
          :load => Load.t(),
          optional(any()) => any()
        }
  @type ask :: %{:session => String.t(), :subject => String.t(), optional(any()) => any()}
  @type strategy :: :fastest | :least_loaded | :random | (ask(), [map()] -> term())

  @doc "One of two or more candidates, and why not by the strategy if that failed."
  @spec choose(strategy(), ask(), [candidate(), ...], Kinds.t(), :rand.state(), integer()) ::
          {candidate(), :rand.state(), nil | String.t()}
  def choose(:fastest, ask, candidates, kinds, rand, now), do: {fastest(ask, candidates, kinds, now), rand, nil}
  def choose(:least_loaded, _ask, candidates, _kinds, rand, _now), do: {least_loaded(candidates), rand, nil}

  def choose(:random, _ask, candidates, _kinds, rand, _now) do
    {number, rand} = :rand.uniform_s(length(candidates), rand)
    {Enum.at(candidates, number - 1), rand, nil}
  end

  def choose(fun, ask, candidates, kinds, rand, now) when is_function(fun, 2) do
    case ask_function(fun, ask, Enum.map(candidates, &shown(&1, ask, kinds, now))) do
      {:ok, id} ->
        case Enum.find(candidates, &(&1.id == id)) do
          nil -> {least_loaded(candidates), rand, "it returned #{inspect(id, limit: 5)}, which is no candidate's id"}
          chosen -> {chosen, rand, nil}
        end

      {:failed, why} ->
        {least_loaded(candidates), rand, why}
    end
  end

  defp shown(kernel, ask, kinds, now) do
    expected = Load.expected(kernel.load, kinds, ask.subject, now)
    %{id: kernel.id, in_flight: kernel.in_flight, last_used: kernel.last_used, expected: expected / 1_000}
  end

  # All that somebody else's function can do: the pool must outlive it.
  defp ask_function(fun, ask, shown) do
    {:ok, fun.(ask, shown)}
  rescue
    error -> {:failed, Exception.format_banner(:error, error)}
  catch
    kind, value -> {:failed, Exception.format_banner(kind, value)}
  end

  defp least_loaded(candidates), do: Enum.min_by(candidates, &{&1.in_flight, &1.last_used})

  defp fastest(%{subject: command}, candidates, kinds, now) do
    known = Enum.map(candidates, &Load.of(&1.load, command, now))
    usual = known |> Enum.filter(&(&1 > 0)) |> Enum.min(fn -> mean(candidates) end)

    waits =
      Enum.zip_with(candidates, known, fn kernel, alone ->
        alone = if alone > 0, do: alone, else: usual
        {alone + Load.ahead(kernel.load, kinds, command, alone, now), kernel}
      end)

    {least, _kernel} = Enum.min_by(waits, &elem(&1, 0))
    for({wait, kernel} <- waits, wait <= least * @about, do: kernel) |> least_loaded()
  end

  defp mean(candidates), do: candidates |> Enum.map(& &1.load.mean) |> Enum.max()
end
