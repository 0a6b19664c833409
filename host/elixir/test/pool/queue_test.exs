defmodule Bridge.Pool.QueueTest do
  use ExUnit.Case, async: true

  alias Bridge.Pool.Queue

  defp put!(queue, session, item) do
    assert {:ok, queue} = Queue.put(queue, session, item)
    queue
  end

  defp filled(bound, pairs),
    do: Enum.reduce(pairs, Queue.new(bound), fn {session, item}, q -> put!(q, session, item) end)

  defp all(queue) do
    case Queue.pop(queue) do
      :empty -> []
      {item, queue} -> [item | all(queue)]
    end
  end

  test "sessions take turns, each in its own order" do
    queue = filled(100, [{"a", 1}, {"a", 2}, {"a", 3}, {"b", 4}, {"c", 5}, {"b", 6}])
    assert all(queue) == [1, 4, 5, 2, 6, 3]
  end

  test "a session that comes later waits for one turn of each, however many the others have" do
    queue = filled(1_000, for(n <- 1..300, do: {"flood", n}))
    {1, queue} = Queue.pop(queue)
    queue = put!(queue, "late", :mine)
    assert {2, queue} = Queue.pop(queue)
    assert {:mine, _queue} = Queue.pop(queue)
  end

  test "who floods gets half of what is free, and the next still finds room" do
    queue =
      Enum.reduce_while(1..100, Queue.new(10), fn n, queue ->
        case Queue.put(queue, "flood", n) do
          {:ok, queue} -> {:cont, queue}
          :full -> {:halt, queue}
        end
      end)

    assert Queue.waiting(queue, "flood") == 5
    assert {:ok, _} = Queue.put(queue, "other", :mine)
  end

  test "a queue without places takes nobody" do
    assert Queue.put(Queue.new(0), "a", 1) == :full
  end

  test "who leaves from the middle is not served, and leaving twice does nothing" do
    queue = filled(100, [{"a", 1}, {"a", 2}, {"a", 3}, {"b", 4}])
    queue = queue |> Queue.remove(2) |> Queue.remove(2) |> Queue.remove(4) |> Queue.remove(:never_there)
    assert all(queue) == [1, 3]
    assert Queue.length(queue) == 2
  end

  # A model beside it: lists, slow and obvious.
  test "whatever is put, popped and removed: nothing is lost, doubled or out of its session's order" do
    for seed <- 1..60 do
      rand = :rand.seed_s(:exsss, seed)

      Enum.reduce(1..200, {Queue.new(40), %{}, rand}, fn item, {queue, model, rand} ->
        {what, rand} = :rand.uniform_s(10, rand)
        {s, rand} = :rand.uniform_s(4, rand)
        session = "s#{s}"
        waiting = model |> Map.values() |> Enum.map(&length/1) |> Enum.sum()
        assert Queue.length(queue) == waiting
        assert waiting <= 40

        cond do
          what <= 5 ->
            mine = length(Map.get(model, session, []))

            case Queue.put(queue, session, item) do
              {:ok, queue} -> {queue, Map.update(model, session, [item], &(&1 ++ [item])), rand}
              :full -> assert(mine >= 40 - waiting) && {queue, model, rand}
            end

          what <= 8 ->
            case Queue.pop(queue) do
              :empty ->
                assert waiting == 0
                {queue, model, rand}

              {popped, queue} ->
                {owner, _} = Enum.find(model, fn {_, items} -> popped in items end)
                assert hd(model[owner]) == popped
                {queue, Map.update!(model, owner, &tl/1), rand}
            end

          true ->
            case Map.get(model, session, []) do
              [] -> {queue, model, rand}
              items -> {Queue.remove(queue, List.last(items)), %{model | session => Enum.drop(items, -1)}, rand}
            end
        end
      end)
    end
  end

  test "ten thousand wait and go in no time that depends on how many they are" do
    queue = filled(20_001, for(n <- 1..10_000, do: {"s", n}))
    queue = Enum.reduce(Enum.take_every(1..10_000, 2), queue, &Queue.remove(&2, &1))
    assert all(queue) == Enum.take_every(2..10_000, 2)
  end
end
