defmodule Bridge.Command.ChunksTest do
  # What comes of a stream over several attempts, and how much may come: no kernel, no process.
  use ExUnit.Case, async: true

  alias Bridge.Command.Chunks
  alias Bridge.{Error, Request}

  @window Request.credit()

  defp chunk(seq, value \\ nil), do: %{"seq" => seq, "value" => value || "value #{seq}"}
  defp take(chunks, params), do: Chunks.take(chunks, params, [], fn json, _path -> {:ok, json} end)

  # A kernel with what credit it has, and a reader: sends and reads as chance says, to the end; what was read.
  defp play(chunks, sent, credit, total, read, given, rand) do
    {coin, rand} = :rand.uniform_s(rand)
    can_read? = read < length(given)
    can_send? = sent < total and credit > 0

    cond do
      can_send? and (coin < 0.6 or not can_read?) ->
        case take(chunks, chunk(sent)) do
          {:ok, chunks, value} -> play(chunks, sent + 1, credit - 1, total, read, given ++ [value], rand)
          {:again, chunks, more} -> play(chunks, sent + 1, credit - 1 + more, total, read, given, rand)
        end

      can_read? ->
        {chunks, more} = Chunks.consumed(chunks)
        play(chunks, sent, credit + more, total, read + 1, given, rand)

      true ->
        {chunks, sent, read, given, rand}
    end
  end

  test "every value is given once and in order, over any number of attempts, and no side waits for the other" do
    for seed <- 1..200 do
      rand = :rand.seed_s(:exsss, seed)

      {chunks, read, given, rand} =
        Enum.reduce(1..3, {Chunks.new(), 0, [], rand}, fn _attempt, {chunks, read, given, rand} ->
          {stop, rand} = :rand.uniform_s(60, rand)
          # A kernel that dies dies after some of them, and never before what had come of it.
          {chunks, _sent, read, given, rand} =
            play(Chunks.attempt(chunks), 0, @window, max(stop, length(given)), read, given, rand)

          {chunks, read, given, rand}
        end)

      {chunks, sent, read, given, _rand} = play(Chunks.attempt(chunks), 0, @window, 100, read, given, rand)
      assert {sent, read} == {100, 100}, "seed #{seed}"
      assert given == for(n <- 0..99, do: "value #{n}")
      assert Chunks.check_complete(chunks, %{"chunks" => 100}) == :ok
    end
  end

  test "more than there was credit for is refused, in a repetition too" do
    full =
      Enum.reduce(0..(@window - 1), Chunks.attempt(Chunks.new()), fn n, chunks ->
        {:ok, chunks, _value} = take(chunks, chunk(n))
        chunks
      end)

    assert {:error, %Error{name: :internal_error}} = take(full, chunk(@window))

    again =
      Enum.reduce(0..(@window - 1), Chunks.attempt(full), fn n, chunks ->
        # Nothing was read, so nothing is paid for.
        {:again, chunks, 0} = take(chunks, chunk(n))
        chunks
      end)

    assert {:error, %Error{name: :internal_error}} = take(again, chunk(@window))
  end

  test "a chunk that is not due, or has no value, is refused whatever it calls itself" do
    chunks = Chunks.attempt(Chunks.new())

    for params <- [chunk(1), chunk(-1), chunk(Integer.pow(10, 40)), chunk("0"), chunk(nil), %{}, %{"seq" => 0}] do
      assert {:error, %Error{name: :internal_error}} = take(chunks, params)
    end
  end

  test "other values the second time are a divergence, and so is an end before all have come again" do
    {:ok, chunks, _} = take(Chunks.attempt(Chunks.new()), chunk(0))
    {:ok, chunks, _} = take(chunks, chunk(1))
    {:again, again, 0} = chunks |> Chunks.attempt() |> take(chunk(0))
    assert {:error, %Error{name: :replay_diverged}} = take(again, chunk(1, "another"))
    assert {:error, %Error{name: :replay_diverged}} = Chunks.check_complete(again, %{"chunks" => 1})
    {:again, again, 0} = take(again, chunk(1))
    assert Chunks.check_complete(again, %{"chunks" => 2}) == :ok
  end

  test "a stream of which something is missing has not ended well, whatever the kernel says it sent" do
    {:ok, chunks, _} = take(Chunks.attempt(Chunks.new()), chunk(0))
    {:again, again, 0} = chunks |> Chunks.attempt() |> take(chunk(0))

    for chunks <- [chunks, again], result <- [2, 0, -1, "1", nil, 1.0] do
      assert {:error, %Error{name: :internal_error}} = Chunks.check_complete(chunks, %{"chunks" => result})
    end

    assert {:error, %Error{name: :internal_error}} = Chunks.check_complete(chunks, %{})
  end

  test "buffers are part of a value" do
    take = &Chunks.take(&1, chunk(0), &2, fn json, _path -> {:ok, json} end)
    {:ok, chunks, _} = take.(Chunks.attempt(Chunks.new()), ["one"])
    assert {:error, %Error{name: :replay_diverged}} = chunks |> Chunks.attempt() |> take.(["two"])
    assert {:again, _, 0} = chunks |> Chunks.attempt() |> take.(["one"])
  end
end
